"""What is handed to a process through a descriptor, without anybody pumping."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def descriptor_of(data: bytes) -> Iterator[int]:
    """A descriptor from which one process can read `data`; it has to be passed on by its number."""
    with open(os.memfd_create("handed"), "r+b") as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(data)
        file.seek(0)
        yield file.fileno()
