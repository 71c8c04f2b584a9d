"""One interface over object storage: a local folder, S3, GCS, Azure (obstore), with conditional writes.

Every call is asynchronous and raises `StoreUnavailable` where the store cannot be reached or refuses; "is not there" and
"was there already" are answers, not errors.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import ObjectStore, from_url

from dagger_operator.api import Storage


class StoreUnavailable(Exception):
    """The object store cannot be reached, refuses us, or cannot be written."""


@dataclass(frozen=True)
class Object:
    data: bytes
    etag: str

    def json(self) -> Any:
        return json.loads(self.data)


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    """Below the run's prefix."""
    size: int
    """Bytes."""
    etag: str


class Store:
    """A run's prefix of an object store."""

    def __init__(self, backend: ObjectStore, url: str) -> None:
        self._backend = backend
        self.url = url
        self._local = url.startswith("file://")
        # obstore's local backend knows create but no compare-and-swap: one process-wide lock file does for a folder.
        self._swap_lock = Path(url.removeprefix("file://")) / ".swap.lock" if self._local else None

    @classmethod
    def open(cls, storage: Storage, environ: Mapping[str, str] | None = None) -> Self:
        """Opens a run's prefix. `environ` (default: the process's) holds credentials under their cloud's usual names."""
        environ = os.environ if environ is None else environ
        url = storage.url.replace("s3a://", "s3://", 1)
        try:
            if url.startswith("file://"):
                Path(url.removeprefix("file://")).mkdir(parents=True, exist_ok=True)
                return cls(from_url(url), url)
            prefixes = {"s3": ("AWS_",), "gs": ("GOOGLE_",), "az": ("AZURE_",), "abfs": ("AZURE_",), "abfss": ("AZURE_",)}
            config = {key.lower(): value for key, value in environ.items() if key.startswith(prefixes[url.split("://", 1)[0]]) and value}
            # CA bundles are a matter of the HTTP client, not of the bucket.
            config.pop("aws_ca_bundle", None)
            if storage.endpoint_url:
                config["aws_endpoint"] = storage.endpoint_url
            if storage.region:
                config["aws_region"] = storage.region
            options: dict[str, Any] = {"timeout": timedelta(seconds=60)}
            if (storage.endpoint_url or "").startswith("http://"):
                options["allow_http"] = True
            retry = {"max_retries": 6, "retry_timeout": timedelta(seconds=90)}
            return cls(from_url(url, config=cast(Any, config), client_options=cast(Any, options), retry_config=cast(Any, retry)), url)
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"storage.url {storage.url!r} cannot be opened: {error}") from error

    async def get(self, key: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            answer = await self._backend.get_async(key)
            data = bytes(await answer.bytes_async())
            return Object(data, answer.meta["e_tag"] or "")
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"reading {key} from {self.url}: {error}") from error

    async def put(self, key: str, data: bytes) -> None:
        """Writes, whatever was there; only for what has one writer and no history."""
        try:
            await self._backend.put_async(key, data)
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"writing {key} to {self.url}: {error}") from error

    async def create(self, key: str, data: bytes) -> bool:
        """Put-if-absent: True where this call made the object, False where it was there already."""
        try:
            await self._backend.put_async(key, data, mode="create")
            return True
        except (AlreadyExistsError, PreconditionError):
            return False
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"creating {key} in {self.url}: {error}") from error

    async def replace(self, key: str, data: bytes, etag: str) -> bool:
        """Compare-and-swap: True where the object still was the one with `etag`."""
        if self._swap_lock is not None:
            return await asyncio.to_thread(self._replace_local, key, data, etag)
        try:
            await self._backend.put_async(key, data, mode={"e_tag": etag})
            return True
        except (PreconditionError, NotFoundError, AlreadyExistsError):
            return False
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"replacing {key} in {self.url}: {error}") from error

    def _replace_local(self, key: str, data: bytes, etag: str) -> bool:
        import fcntl  # not on every platform that can read a run

        assert self._swap_lock is not None
        try:
            with self._swap_lock.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    current = self._backend.head(key)["e_tag"]
                except (NotFoundError, FileNotFoundError):
                    return False
                if current != etag:
                    return False
                self._backend.put(key, data)
                return True
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"replacing {key} in {self.url}: {error}") from error

    async def delete(self, key: str) -> None:
        """Removes an object; one that is not there is fine."""
        try:
            await self._backend.delete_async(key)
        except (NotFoundError, FileNotFoundError):
            return
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"deleting {key} in {self.url}: {error}") from error

    async def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a prefix, in order of their keys."""
        return sorted([info async for info in self._list(prefix)], key=lambda info: info.key)

    async def _list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        try:
            async for chunk in obstore.list(self._backend, prefix=prefix.rstrip("/")):
                for meta in chunk:
                    yield ObjectInfo(meta["path"], meta["size"], meta["e_tag"] or "")
        except (NotFoundError, FileNotFoundError):
            return
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"listing {prefix} in {self.url}: {error}") from error

    async def upload(self, key: str, path: Path) -> None:
        """Writes a file, in parts where it is large."""
        try:
            await self._backend.put_async(key, path)
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"uploading {key} to {self.url}: {error}") from error

    async def download(self, key: str, path: Path) -> None:
        """Reads an object into a file, atomically: the file is there whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        try:
            answer = await self._backend.get_async(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                async for chunk in answer.stream():
                    file.write(chunk)
            partial.replace(path)
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"downloading {key} from {self.url}: {error}") from error
