"""A provider's folder beside those of others, and the removal of what dead providers left behind."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dagger_operator.sandbox import filesystem
from dagger_operator.sandbox.cgroup import Cgroups


@dataclass(frozen=True)
class Tenancy:
    """`<root>/<name>/`, held by a lock on `<root>/<name>.lock` that the kernel releases when its owner dies, however it dies."""

    name: str
    folder: Path
    lock: int

    @classmethod
    def take(cls, root: Path, cgroups: Cgroups | None) -> Self:
        """Sweep, then create and lock a new folder. Blocks briefly."""
        root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(root):
            for lock in root.glob("*.lock"):
                _sweep(lock, cgroups)
            name = secrets.token_hex(6)
            held = _try_lock(root / f"{name}.lock")
            assert held is not None, "the name is new, and the root is locked"
            (root / name).mkdir()
        return cls(name, root / name, held)

    def give_up(self) -> None:
        """Remove the folder and release the lock."""
        filesystem.remove(self.folder)
        self.folder.with_suffix(".lock").unlink(missing_ok=True)
        os.close(self.lock)


def _sweep(lock: Path, cgroups: Cgroups | None) -> None:
    held = _try_lock(lock)
    if held is None:
        return  # its owner is alive
    try:
        filesystem.end_processes_in(lock.with_suffix(""))
        filesystem.remove(lock.with_suffix(""))
        if cgroups:
            cgroups.sweep(f"{lock.stem}.")
        lock.unlink(missing_ok=True)
    finally:
        os.close(held)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Lock the root: nobody else may look between the creation of a lock file and its locking."""
    descriptor = os.open(root / ".sweeping", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
