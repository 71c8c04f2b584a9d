"""One interface over object storage: a local folder, S3, GCS, Azure (obstore), with conditional writes.

Every call is asynchronous and raises `StoreUnavailable` where the store cannot be reached or refuses; "is not there" and
"was there already" are answers, not errors.
"""

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import ObjectStore, from_url

from dagger_operator.api import Storage
from dagger_operator.store.connect import connection

_PART = 16 << 20
"""Bytes of one part of a large transfer."""
_PARTS_AT_ONCE = 4
_MOST_PARTS = 9000
"""S3 takes 10,000 parts in one upload."""


class StoreUnavailable(Exception):
    """The object store cannot be reached, refuses us, or cannot be written."""


class DamagedObject(Exception):
    """An object is missing or is not what its manifest or its format says: infrastructure's fault, never data."""

    def __init__(self, key: str, problem: str, remedy: str = "`daggerctl store fsck` lists everything that is damaged") -> None:
        self.key, self.problem, self.remedy = key, problem, remedy
        super().__init__(f"{key}: {problem}; {remedy}")


@dataclass(frozen=True)
class Object:
    data: bytes
    etag: str
    """Names this content to `swap`; opaque (of a local folder a digest, of GCS the generation)."""

    def json(self) -> Any:
        return json.loads(self.data)


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    """Below the run's prefix."""
    size: int
    """Bytes."""


class Store:
    """A run's prefix of an object store."""

    def __init__(self, backend: ObjectStore, url: str, *, scheme: str, folder: Path | None = None) -> None:
        self._backend, self.url, self._scheme, self._folder = backend, url, scheme, folder

    @classmethod
    def open(cls, storage: Storage, environ: Mapping[str, str] | None = None) -> Self:
        """Opens a run's prefix. `environ` (default: the process's) holds credentials under their cloud's usual names."""
        try:
            to = connection(storage, os.environ if environ is None else environ)
            if to.folder is not None:
                to.folder.mkdir(parents=True, exist_ok=True)
                return cls(from_url(to.url), to.url, scheme=to.scheme, folder=to.folder)
            backend = from_url(to.url, config=cast(Any, to.config), client_options=cast(Any, to.client), retry_config=cast(Any, to.retry))
            return cls(backend, to.url, scheme=to.scheme)
        except (BaseError, OSError, ValueError) as error:
            raise StoreUnavailable(f"storage.url {storage.url!r} cannot be opened: {_first_line(error)}") from error

    async def get(self, key: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            answer = await self._backend.get_async(key)
            data = bytes(await answer.bytes_async())
            return Object(data, self._etag(cast(Mapping[str, Any], answer.meta), data))
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable("reading", key, error) from error

    async def exists(self, key: str) -> bool:
        try:
            await self._backend.head_async(key)
            return True
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise self._unavailable("reading", key, error) from error

    async def put(self, key: str, data: bytes) -> None:
        """Writes, whatever was there; only for what has one writer and no history."""
        try:
            await self._backend.put_async(key, data, use_multipart=False)
        except (BaseError, OSError) as error:
            raise self._unavailable("writing", key, error) from error

    async def create(self, key: str, data: bytes) -> bool:
        """Put-if-absent: True where this call made the object, False where another was there already. See `swap`."""
        return await self.swap(key, data, None) is not None

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        """Compare-and-swap from `expected` (None: there is no object): the object now there, or None where another was there.

        The same bytes count as ours: a request whose answer was lost is repeated by the client and then meets its own first
        try. So data for which writers race has to name its writer.
        """
        try:
            if expected is not None and self._folder is not None:
                done = await asyncio.to_thread(self._swap_in_folder, self._folder, key, data, expected)
                return Object(data, self._etag({}, data)) if done else None
            mode: Any = "create"
            if expected is not None:
                mode = {"version" if self._scheme == "gs" else "e_tag": expected.etag}
            made = await self._backend.put_async(key, data, mode=mode)
            return Object(data, self._etag(cast(Mapping[str, Any], made), data))
        except (AlreadyExistsError, PreconditionError):
            current = await self.get(key)
            return current if current is not None and current.data == data else None
        except FileNotFoundError:
            if expected is not None:
                return None
            raise StoreUnavailable(f"creating {key} in {self.url}: there is no such bucket or folder; create it first") from None
        except (BaseError, OSError) as error:
            raise self._unavailable("creating" if expected is None else "replacing", key, error) from error

    def _swap_in_folder(self, folder: Path, key: str, data: bytes, expected: Object) -> bool:
        with _locked(folder):
            if bytes(self._backend.get(key).bytes()) != expected.data:
                return False
            self._backend.put(key, data, use_multipart=False)
            return True

    def _delete_in_folder(self, folder: Path, key: str) -> None:
        with _locked(folder):
            self._backend.delete(key)

    def _etag(self, meta: Mapping[str, Any], data: bytes) -> str:
        if self._folder is not None:
            # The backend's own is made of inode, time and size, which a quick succession of writes can bring back.
            return hashlib.sha256(data).hexdigest()
        etag = meta.get("version" if self._scheme == "gs" else "e_tag")
        if not etag:
            raise StoreUnavailable(f"{self.url} gives objects no ETag, without which conditional writes are impossible")
        return str(etag)

    async def delete(self, key: str) -> None:
        """Removes an object; one that is not there is fine."""
        try:
            if self._folder is not None:
                await asyncio.to_thread(self._delete_in_folder, self._folder, key)
            else:
                await self._backend.delete_async(key)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise self._unavailable("deleting", key, error) from error

    async def list(self, prefix: str = "") -> list[ObjectInfo]:
        """All objects below a folder (not: whose names start with it), in order of their keys."""
        try:
            chunks = obstore.list(self._backend, prefix=prefix.rstrip("/") or None)
            found = [ObjectInfo(meta["path"], meta["size"]) async for chunk in chunks for meta in chunk]
        except (BaseError, OSError) as error:
            raise self._unavailable("listing", prefix, error) from error
        return sorted(found, key=lambda info: info.key)

    async def upload(self, key: str, path: Path) -> None:
        """Writes a file, in parts where it is large; readers see it whole or not at all."""
        try:
            part = max(_PART, (await asyncio.to_thread(path.stat)).st_size // _MOST_PARTS)
            await self._backend.put_async(key, path, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)
        except (BaseError, OSError) as error:
            raise self._unavailable("uploading", key, error) from error

    async def download(self, key: str, path: Path) -> bool:
        """Reads an object, which nobody may change meanwhile, into a file that is there whole or not at all. One caller a file.

        False where there is no such object. Parts are read side by side and each is retried alone.
        """
        partial = path.with_name(f".{path.name}.partial")
        try:
            size = (await self._backend.head_async(key))["size"]
            path.parent.mkdir(parents=True, exist_ok=True)
            gate = asyncio.Semaphore(_PARTS_AT_ONCE)

            async def part(start: int, descriptor: int) -> None:
                async with gate:
                    data = await self._backend.get_range_async(key, start=start, end=min(start + _PART, size))
                    await asyncio.to_thread(os.pwrite, descriptor, data, start)

            with partial.open("wb") as file:
                async with asyncio.TaskGroup() as group:
                    for start in range(0, size, _PART):
                        group.create_task(part(start, file.fileno()))
            partial.replace(path)
            return True
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise self._unavailable("downloading", key, error) from error
        except ExceptionGroup as group_error:
            first = group_error.exceptions[0]
            if isinstance(first, BaseError | OSError):
                raise self._unavailable("downloading", key, first) from first
            raise
        finally:
            partial.unlink(missing_ok=True)

    def _unavailable(self, doing: str, key: str, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"{doing} {key} in {self.url}: {_first_line(error)}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """obstore's local backend can create but not compare; a lock on the folder itself makes up for it and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    """obstore appends its Rust structures to every message."""
    return str(error).split("\n\nDebug source", 1)[0].strip()
