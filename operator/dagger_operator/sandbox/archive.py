"""Packs text files for transfer into a sandbox."""

import tarfile
from collections.abc import Iterable, Mapping
from io import BytesIO


def archive(files: Mapping[str, str], folders: Iterable[str] = ()) -> bytes:
    """Return a tar archive of text files and empty folders by absolute path, to be unpacked at the root."""
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in folders:
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for path, text in files.items():
            data = text.encode("utf-8", "surrogatepass")
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, BytesIO(data))
    return packed.getvalue()
