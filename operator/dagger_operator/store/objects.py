"""One interface to object storage: a local folder, S3, GCS, Azure (obstore), with conditional writes.

Every call is asynchronous and raises `StoreUnavailable` if the store cannot be reached or refuses; "does not exist" and "already exists"
are results, not errors.
"""

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import ObjectStore, from_url

from dagger_operator.api import Storage
from dagger_operator.store.connect import Connection, connection
from dagger_operator.store.credentials import Credentials, Keys, OwnIdentity, own_identity

T = TypeVar("T")
_PART = 16 << 20
"""Size in bytes of one part of a large transfer."""
_PARTS_AT_ONCE = 4
_CHUNK = 64 << 10
"""Bytes read at a time from an object whose size is limited."""
_CALLS_AT_ONCE = 32
_MOST_PARTS = 9000
"""S3 allows 10,000 parts per upload."""
SMALL_BYTES = 64 << 10
"""Upper bound for objects that hold one fact: an owner, a pointer, a worker's progress."""
_MESSAGE_CHARACTERS = 500
ABSENT = re.compile(r"<Code>(NoSuchKey|BlobNotFound)</Code>")
"""How S3, GCS and Azure report that an object does not exist. A 404 without it may come from a missing bucket, a gateway or anyone."""
_BYTES = re.compile(r"\[\d+(, \d+)+\]")
_SIGNED_FOR = timedelta(minutes=15)
"""Also the most that two clocks may differ for a signed request."""


class StoreUnavailable(Exception):
    """The object store cannot be reached, denies access, or cannot be written."""


class DamagedObject(Exception):
    """An object is missing or does not match its manifest or format: infrastructure's fault, never data."""

    def __init__(self, key: str, problem: str, remedy: str = "`daggerctl store fsck` lists everything that is damaged") -> None:
        self.key, self.problem, self.remedy = key, problem, remedy
        super().__init__(f"{key}: {problem}; {remedy}")


def oversized(key: str, size: int, most: int) -> DamagedObject:
    """Return the error for an object of `size` bytes or more that should be small."""
    return DamagedObject(key, f"has {size} bytes or more, where {most} at most are expected")


class _NotThere(Exception):
    """The object does not exist. Not `FileNotFoundError`, which a local file may raise too."""


@dataclass(frozen=True)
class Object:
    data: bytes
    etag: str
    """Identifies this content to `swap`; opaque (for a local folder a digest, for GCS the generation)."""

    def json(self) -> Any:
        return json.loads(self.data)


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    """Relative to the run's prefix."""
    size: int
    """In bytes."""


class Reads(Protocol):
    """A store for readers of small objects only."""

    async def get(self, key: str, most: int) -> Object | None:
        """Return the object, or None if it does not exist. One of more than `most` bytes raises `DamagedObject`, and is not read."""
        ...


class Clients:
    """Cloud clients, one per bucket and credentials, whose connections are shared by all stores opened with this object.

    A client of its own would cost each store 4 ms, 100 KiB and its own TLS connections, which matters if one process opens a thousand.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[tuple[Any, ...], ObjectStore] = weakref.WeakValueDictionary()

    def of(self, to: Connection) -> ObjectStore:
        key = (to.bucket, *sorted(to.config.items()), *sorted(to.client.items()))
        known = self._known.get(key)
        if known is None:
            settings = {"config": cast(Any, to.config), "client_options": cast(Any, to.client), "retry_config": cast(Any, to.retry)}
            known = self._known[key] = from_url(to.bucket, **settings)
        return known


class Store:
    """A run's prefix of an object store."""

    def __init__(
        self,
        backend: ObjectStore,
        url: str,
        *,
        scheme: str,
        prefix: str = "",
        folder: Path | None = None,
        threads: ThreadPoolExecutor | None = None,
        named_server: bool = False,
    ) -> None:
        """`prefix` is the run's prefix within the backend, ending with a slash."""
        self._backend, self.url, self._scheme, self._prefix, self._folder = backend, url, scheme, prefix, folder
        self.named_server = named_server
        """Whether the run or its Secret names the store's server."""
        self._threads = threads or ThreadPoolExecutor(_CALLS_AT_ONCE, thread_name_prefix="store")

    @classmethod
    def open(
        cls,
        storage: Storage,
        credentials: Credentials | None = None,
        threads: ThreadPoolExecutor | None = None,
        clients: Clients | None = None,
    ) -> Self:
        """Open a run's prefix; `credentials` default to this process's environment. Many open stores should share `threads`, which do the
        work, and `clients` (default: one per store)."""
        if isinstance(credentials, Keys):
            own_identity()  # removes it from the environment: obstore would add it to the keys
        try:
            to = connection(storage, credentials or OwnIdentity(os.environ))
            if to.folder is not None:
                to.folder.mkdir(parents=True, exist_ok=True)
                return cls(from_url(to.url), to.url, scheme=to.scheme, folder=to.folder, threads=threads)
            backend = (clients or Clients()).of(to)
            return cls(backend, to.url, scheme=to.scheme, prefix=to.prefix, threads=threads, named_server=to.named_server)
        except (BaseError, OSError, ValueError) as error:
            # Not `from error`: it may quote a key in full.
            raise StoreUnavailable(f"storage.url {storage.url!r} cannot be opened: {_first_line(error)}") from None

    async def get(self, key: str, most: int | None = None) -> Object | None:
        """Return the object, or None if it does not exist. One of more than `most` bytes raises `DamagedObject`, and is not read."""

        def read() -> Object:
            answer = self._backend.get(self._prefix + key)
            data = bytes(answer.bytes()) if most is None else _bounded(answer, key, most)
            return Object(data, self._etag(cast(Mapping[str, Any], answer.meta), data))

        try:
            return await self._run("reading", key, read, answers=(FileNotFoundError,))
        except FileNotFoundError as error:
            if self._folder is None and not ABSENT.search(str(error)):
                raise self._unavailable("reading", key, error) from error
            return None

    def _there(self, key: str, call: Callable[[], T]) -> T:
        """Return the result of a call. Raises `_NotThere` if the server says so: a 404 to a HEAD has no body, so a GET checks it."""
        try:
            return call()
        except FileNotFoundError as error:
            if self._folder is not None or ABSENT.search(str(error)):
                raise _NotThere from error
        try:
            self._backend.get(self._prefix + key)
        except FileNotFoundError as error:
            if ABSENT.search(str(error)):
                raise _NotThere from error
            raise
        return call()

    async def signed(self, key: str) -> str:
        """Return a URL with which anyone can read the object for 15 minutes. Not for folders."""
        backend = cast(Any, self._backend)
        return await self._run("signing for", key, lambda: obstore.sign(backend, "GET", self._prefix + key, _SIGNED_FOR))

    async def exists(self, key: str) -> bool:
        try:
            await self._run("reading", key, lambda: self._there(key, lambda: self._backend.head(self._prefix + key)), answers=(_NotThere,))
            return True
        except _NotThere:
            return False

    async def put(self, key: str, data: bytes) -> None:
        """Write an object, overwriting it if it exists; only for objects with one writer and no history."""
        await self._run("writing", key, lambda: self._backend.put(self._prefix + key, data, use_multipart=False))

    async def create(self, key: str, data: bytes) -> bool:
        """Put-if-absent: return True if this call created the object, False if another one existed already. See `swap`."""
        return await self.swap(key, data, None) is not None

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        """Compare-and-swap from `expected` (None: no object): return the new object, or None if the store holds another one.

        Finding identical bytes counts as success: the client repeats a request whose answer was lost, and then meets its own first
        attempt. So data that several writers compete to write must name its writer.
        """

        def write() -> Object | None:
            if expected is not None and self._folder is not None:
                return self._swap_in_folder(self._folder, key, data, expected)
            mode: Any = "create"
            if expected is not None:
                mode = {"version" if self._scheme == "gs" else "e_tag": expected.etag}
            made = self._backend.put(self._prefix + key, data, mode=mode)
            return Object(data, self._etag(cast(Mapping[str, Any], made), data))

        doing, answers = "creating" if expected is None else "replacing", (AlreadyExistsError, PreconditionError, FileNotFoundError)
        try:
            return await self._run(doing, key, write, answers=answers)
        except (AlreadyExistsError, PreconditionError):
            current = await self.get(key)
            return current if current is not None and current.data == data else None
        except FileNotFoundError:
            if expected is not None:
                return None
            raise StoreUnavailable(f"creating {key} in {self.url}: there is no such bucket or folder; create it first") from None

    def _swap_in_folder(self, folder: Path, key: str, data: bytes, expected: Object) -> Object | None:
        with _locked(folder):
            if bytes(self._backend.get(self._prefix + key).bytes()) != expected.data:
                return None
            self._backend.put(self._prefix + key, data, use_multipart=False)
            return Object(data, self._etag({}, data))

    def _etag(self, meta: Mapping[str, Any], data: bytes) -> str:
        if self._folder is not None:
            # The backend's own is made of inode, time and size, which can recur after writes in quick succession.
            return hashlib.sha256(data).hexdigest()
        etag = meta.get("version" if self._scheme == "gs" else "e_tag")
        if not etag:
            raise StoreUnavailable(f"{self.url} gives objects no ETag, without which conditional writes are impossible")
        return str(etag)

    async def delete(self, key: str) -> None:
        """Delete an object; a missing one is not an error."""

        def remove() -> None:
            with _locked(self._folder) if self._folder is not None else nullcontext():
                self._backend.delete(self._prefix + key)

        with suppress(FileNotFoundError):
            await self._run("deleting", key, remove, answers=(FileNotFoundError,))

    async def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Return all objects below a folder (not: whose names start with it), sorted by key."""

        def look() -> Iterator[ObjectInfo]:
            for chunk in obstore.list(self._backend, prefix=(self._prefix + prefix).rstrip("/") or None):
                yield from (ObjectInfo(meta["path"].removeprefix(self._prefix), meta["size"]) for meta in chunk)

        return await self._run("listing", prefix, lambda: sorted(look(), key=lambda info: info.key))

    async def upload(self, key: str, path: Path) -> None:
        """Write a file, in parts if it is large; readers see it whole or not at all."""

        def send() -> None:
            part = max(_PART, path.stat().st_size // _MOST_PARTS)
            self._backend.put(self._prefix + key, path, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)

        await self._run("uploading", key, send)

    async def download(self, key: str, path: Path) -> bool:
        """Read an object, which must not change meanwhile, into a file that appears atomically. One caller per file.

        Returns False if the object does not exist. Parts are read concurrently and each is retried alone. Raises `OSError`, which names
        `path`, if the file cannot be written: that is not the store's fault.
        """

        def fetch() -> None:
            size = of_storage(lambda: self._backend.head(self._prefix + key)["size"])
            partial = path.with_name(f".{path.name}.partial")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file, ThreadPoolExecutor(_PARTS_AT_ONCE) as threads:

                    def part(start: int) -> None:
                        end = min(start + _PART, size)
                        read = of_storage(lambda: self._backend.get_range(self._prefix + key, start=start, end=end))
                        if os.pwrite(file.fileno(), read, start) < len(read):  # the first sign of a full disk
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                    deque(threads.map(part, range(0, size, _PART)), maxlen=0)
                partial.replace(path)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
            finally:
                with suppress(OSError):  # adds nothing to the first error
                    partial.unlink()

        def of_storage(call: Callable[[], T]) -> T:
            try:
                return self._there(key, call)
            except (BaseError, OSError) as error:
                raise self._unavailable("downloading", key, error) from error

        try:
            await self._run("downloading", key, fetch, answers=(_NotThere, OSError))
            return True
        except _NotThere:
            return False

    async def _run(self, doing: str, key: str, work: Callable[[], T], *, answers: tuple[type[Exception], ...] = ()) -> T:
        """Run blocking work in one of our threads; exceptions listed in `answers` pass unchanged.

        obstore's own coroutines finish on Tokio threads, which touch the interpreter once more afterwards: a process that exits
        right after its last call, as stages do, would then occasionally abort (exit code 134).
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except answers:
            raise
        except (BaseError, OSError) as error:
            raise self._unavailable(doing, key, error) from error

    def _unavailable(self, doing: str, key: str, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"{doing} {key} in {self.url}: {_first_line(error)}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder. obstore's local backend can create but not compare; a lock on the folder makes up for it and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _bounded(answer: "obstore.GetResult", key: str, most: int) -> bytes:
    if answer.meta["size"] > most:
        raise oversized(key, answer.meta["size"], most)
    data = bytearray()
    for part in answer.stream(min_chunk_size=_CHUNK):
        data += part
        if len(data) > most:  # a server may send more than it announced
            raise oversized(key, len(data), most)
    return bytes(data)


def _first_line(error: Exception) -> str:
    """Strip from an error what obstore appends: Rust structures and a server's whole answer; and a key it cannot read, shown as bytes."""
    told = _BYTES.sub("[...]", str(error).split("\n\nDebug source", 1)[0])
    return told.strip()[:_MESSAGE_CHARACTERS]
