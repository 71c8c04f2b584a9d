"""The results of runs in object storage: one open store per run, and no run that delays another."""

import asyncio
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import aiohttp

from dagger_operator.api import DAggerRun, Storage
from dagger_operator.cluster.cache import RunKey
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.named_server import NamedServer, session
from dagger_operator.cluster.places import give_way
from dagger_operator.control import Results, read_progress, read_results
from dagger_operator.control.progress import Progress
from dagger_operator.kube.errors import ApiError, Missing
from dagger_operator.store.credentials import Credentials, Keys, own_identity
from dagger_operator.store.objects import Clients, Reads, Store, StoreUnavailable

SECRET_SECONDS = 60.0
"""Seconds for which a Secret's content is considered current; after a failure it is read at once."""
PATIENCE_SECONDS = 10.0
"""A store that takes longer is reported as unavailable. The read continues, so that there is one at a time and nobody waits twice."""
GLANCE_SECONDS = 0.2
"""For a store that was unavailable, until it has answered in time again: a worker that waits for it cannot reconcile other runs."""
WARY_SECONDS = 2.0
"""For a store whose server kept another run waiting that long: otherwise all of its runs would wait, and those of other servers with
them."""
AT_HAND_SECONDS = 0.05
"""Seconds that a reconcile waits for a store without giving its place to another."""
PROGRESS_A_SECOND = 20.0
"""Reads of progress per second, over all runs, so that what is only shown does not cost more with every run. Up to 200 runs show theirs at
every reconcile."""
_THREADS = 16
_ENCRYPTS = "AWS_SSE_CUSTOMER_KEY_BASE64"
"""Needs additional headers, which the signed URLs for a `NamedServer` cannot contain."""


@dataclass
class _Server:
    """State shared by runs with storage on one server."""

    threads: ThreadPoolExecutor
    """A hanging server delays only its own runs. The threads end with the last run that uses them."""
    silent: bool = False
    """Whether it kept a run waiting for too long, and has answered none in time since."""


@dataclass
class _Open:
    uid: str | None
    storage: Storage
    secret_version: str
    checked: float
    """When the Secret was last read."""
    server: _Server
    store: Store
    reads: Reads
    results: Results = field(default_factory=Results)
    progress: Progress = field(default_factory=dict)
    progress_due: float = float("-inf")
    reading: asyncio.Task[tuple[Results, Progress]] | None = None
    took: float = 0.0
    """Seconds that the last finished read took."""
    problem: str | None = None
    """Why the store is considered unavailable; None once it has answered in time."""


class Stores:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._open: dict[RunKey, _Open] = {}
        self._servers: WeakValueDictionary[str, _Server] = WeakValueDictionary()
        self._clients = Clients()
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    async def read(self, run: DAggerRun) -> tuple[Results, Progress]:
        """Return all results of a run so far, and the progress of its stages.

        Raises `StoreUnavailable`, also for missing credentials, or `DamagedObject`.
        """
        key = RunKey(run.metadata.namespace, run.metadata.name)
        opened = await self._opened(key, run)
        while True:
            begun_before = opened.reading is not None
            patience = GLANCE_SECONDS if opened.problem else WARY_SECONDS if opened.server.silent else PATIENCE_SECONDS
            task = opened.reading = opened.reading or asyncio.create_task(_timed(opened, run))
            if not begun_before:
                await _waited_for(task, patience)
            if not task.done():
                opened.server.silent = True
                opened.problem = opened.problem or f"{opened.store.url} did not answer within {patience:.0f} s"
                raise StoreUnavailable(opened.problem)
            opened.reading = None
            if opened.took <= PATIENCE_SECONDS:
                opened.problem, opened.server.silent = None, False
            try:
                results, progress = task.result()
            except StoreUnavailable as error:
                opened.problem = str(error)
                opened.checked = float("-inf")  # perhaps its credentials were replaced
                raise
            if progress is not opened.progress:
                opened.progress, opened.progress_due = progress, time.monotonic() + len(self._open) / PROGRESS_A_SECOND
            opened.results = results
            if not begun_before:  # otherwise it may be older than the observed children
                return results, progress

    def forget(self, key: RunKey) -> None:
        """Free what is kept for a run that is over or gone."""
        opened = self._open.pop(key, None)
        if opened is not None and opened.reading is not None:
            opened.reading.cancel()

    async def _opened(self, key: RunKey, run: DAggerRun) -> _Open:
        opened, storage, now = self._open.get(key), run.spec.storage, time.monotonic()
        same = opened is not None and (opened.uid, opened.storage) == (run.metadata.uid, storage)
        if opened is not None and same and (storage.secret_ref is None or now - opened.checked < SECRET_SECONDS):
            return opened
        version, credentials = await self._credentials(run)
        if opened is not None and same and opened.secret_version == version:
            opened.checked = now
            return opened
        self.forget(key)
        server = self._server(storage)
        store = Store.open(storage, credentials, server.threads, self._clients)
        self._open[key] = _Open(run.metadata.uid, storage, version, now, server, store, self._reads(store, credentials))
        return self._open[key]

    async def _credentials(self, run: DAggerRun) -> tuple[str, Credentials]:
        """Return the Secret's version and content; without a Secret the operator's own identity."""
        reference = run.spec.storage.secret_ref
        if reference is None:
            return "", own_identity()
        where = f"Secret {reference.name} in namespace {run.metadata.namespace} (spec.storage.secretRef)"
        try:
            secret = await self._client.get("v1", "Secret", run.metadata.namespace, reference.name)
        except Missing:
            raise StoreUnavailable(f"{where} does not exist: create it with the storage's credentials, such as AWS_ACCESS_KEY_ID") from None
        except ApiError as error:
            raise StoreUnavailable(f"{where} cannot be read: {error.reason or error.code}: {error.message}") from None
        values = {name: _decoded(value, f"{where}, key {name}") for name, value in (secret.get("data") or {}).items()}
        return secret["metadata"]["resourceVersion"], Keys(values, where)

    def _reads(self, store: Store, credentials: Credentials) -> Reads:
        if not store.named_server:
            return store
        held = credentials.values if isinstance(credentials, Keys) else credentials.environ
        if _ENCRYPTS in map(str.upper, held):
            whose = credentials.source if isinstance(credentials, Keys) else "The operator's environment"
            remedy = "leave it out, or the endpoint (spec.storage.endpointUrl, AWS_ENDPOINT_URL)"
            raise StoreUnavailable(f"{whose} has {_ENCRYPTS}, with which the operator reads from AWS's own servers alone: {remedy}")
        self._http = self._http or session()
        return NamedServer(store, self._http)

    def _server(self, storage: Storage) -> _Server:
        url = urlsplit(storage.url)
        name = storage.endpoint_url or f"{url.scheme}://{url.netloc}"
        if (server := self._servers.get(name)) is None:
            server = self._servers[name] = _Server(ThreadPoolExecutor(_THREADS, thread_name_prefix="store"))
        return server


def _decoded(value: str, what: str) -> str:
    try:
        return b64decode(value, validate=True).decode(errors="replace")
    except ValueError as error:
        raise StoreUnavailable(f"{what} is not base64 ({error}): create the Secret again with `kubectl create secret`") from None


async def _waited_for(reading: asyncio.Task[tuple[Results, Progress]], seconds: float) -> None:
    """Wait until it is done, or for so long; whoever waits longer than for a fast store lets others work."""
    await asyncio.wait({reading}, timeout=min(seconds, AT_HAND_SECONDS))
    if not reading.done():
        give_way()
        await asyncio.wait({reading}, timeout=seconds - AT_HAND_SECONDS)


async def _timed(opened: _Open, run: DAggerRun) -> tuple[Results, Progress]:
    begun = time.monotonic()
    try:
        return await _read(opened, run)
    finally:
        opened.took = time.monotonic() - begun


async def _read(opened: _Open, run: DAggerRun) -> tuple[Results, Progress]:
    results = await read_results(opened.reads, run, opened.results)
    if results.records.keys() == opened.results.records.keys() and time.monotonic() < opened.progress_due:
        return results, opened.progress
    return results, await read_progress(opened.reads, run, results)
