"""kopf as the transport: lists and watches fill the cache, and the keys of runs go into the queue; nothing is decided here."""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import kopf
import structlog
from kopf._cogs.structs.bodies import RawBody
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory

from dagger_operator.api import GROUP, KIND, VERSION
from dagger_operator.cluster.cache import Cache, RunKey, identity
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.connection import kopf_session
from dagger_operator.cluster.settings import Settings
from dagger_operator.cluster.streams import Streams
from dagger_operator.control import MANAGED_BY, MANAGED_BY_VALUE
from dagger_operator.kube.errors import ApiError, Missing

log = structlog.get_logger()

RUNS = (GROUP, VERSION, "daggerruns", KIND)
CHILDREN = (
    ("apps", "v1", "deployments", "Deployment"),
    ("batch", "v1", "jobs", "Job"),
    ("", "v1", "services", "Service"),
    ("", "v1", "serviceaccounts", "ServiceAccount"),
    ("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    ("", "v1", "pods", "Pod"),
)
OPTIONAL = (("leaderworkerset.x-k8s.io", "v1", "leaderworkersets", "LeaderWorkerSet"),)
"""Watched if the cluster has it; if it is added later, the operator watches it after a restart."""

_IDLE_SECONDS = 0.05
"""Seconds for which kopf keeps what it last received about an object: at a start this is everything, in full."""
_RECONNECT_SECONDS = 240
"""Seconds after which a watch is reopened, so that each gives a sign of life even if nothing happens."""


class NewKind(Exception):
    """The cluster has a kind that is not watched, since it did not exist when the watches were opened."""


class Watches:
    def __init__(
        self,
        settings: Settings,
        cache: Cache,
        client: Client,
        *,
        wake: Callable[[RunKey], None],
        gone: Callable[[str], None],
        heard: Callable[[Mapping[str, Any] | None, Mapping[str, Any]], None],
    ) -> None:
        """`wake` gets the run that something concerns, `gone` the uid of a deleted object, `heard` the previous and the current object."""
        self._settings, self._cache, self._client = settings, cache, client
        self._wake, self._gone, self._heard = wake, gone, heard
        self.streams = Streams(self._listed)
        self._sweeps: set[asyncio.Task[None]] = set()
        self._watched: frozenset[str] = frozenset()

    async def run(self, traces: Collection[Any] = ()) -> None:
        """Watch until the process is told to stop (SIGTERM, SIGINT), then return. Raises if something cannot be watched."""
        kinds = await self._kinds()
        self._watched = frozenset(kind for *_, kind in kinds)
        self.streams.expect({plural for _, _, plural, _ in kinds}, self._settings.namespaces)

        registry = kopf.OperatorRegistry()
        for group, version, plural, kind in kinds:
            kopf.on.event(group, version, plural, registry=registry)(self._handler(_api_version(group, version), kind))

        @kopf.on.login(registry=registry)  # type: ignore[untyped-decorator, unused-ignore]  # kopf leaves the handler's type open
        async def login(**_: Any) -> kopf.AiohttpSession:
            return await kopf_session([self.streams.trace, *traces])

        namespaces = self._settings.namespaces
        memories = _Forgetful()
        await kopf.operator(registry=registry, settings=_settings(), memories=memories, clusterwide=not namespaces, namespaces=namespaces)

    async def fill(self) -> None:
        """Return once the cache holds everything that existed when the watches were opened; then every run is reconciled.

        A run reconciled with half its children seems to have lost them. kopf does not say when it has delivered its initial lists, so
        everything is listed once more. Raises `ApiError`.
        """
        while not self.streams.open:  # noqa: ASYNC110 - kopf opens them without notification
            await asyncio.sleep(0.1)
        selectors = _settings().watching.label_selectors
        for group, version, plural, kind in await self._kinds():
            selector = selectors.get((group, version, plural))
            query = {"labelSelector": str(selector)} if selector else {}
            for namespace in self._settings.namespaces or ("",):
                async for manifest in self._client.list(_api_version(group, version), kind, namespace, **query):
                    self._cache.put(manifest)
        for run in list(self._cache.of_kind(KIND)):
            self._wake(RunKey(run["metadata"]["namespace"], run["metadata"]["name"]))

    async def outgrow(self, every: float = 30.0) -> None:
        """Check forever whether there is a new kind to watch. Raises `NewKind`: kopf opens watches only at a start."""
        while True:
            await asyncio.sleep(every)
            with contextlib.suppress(ApiError):
                new = {kind for *_, kind in await self._kinds()} - self._watched
                if self._watched and new:
                    raise NewKind(f"{', '.join(sorted(new))} came to the cluster and is watched from the next start on")

    async def _kinds(self) -> list[tuple[str, str, str, str]]:
        there = [one for one in OPTIONAL if one[3] in await self._client.served(_api_version(*one[:2]))]
        return [RUNS, *CHILDREN, *there]

    def _handler(self, api_version: str, kind: str) -> Callable[..., Any]:
        async def heard(event: kopf.RawEvent, **_: Any) -> None:
            # Items of a list have neither field, events have both.
            manifest: dict[str, Any] = {**event["object"], "apiVersion": api_version, "kind": kind}
            before = self._cache.get(identity(manifest))
            if event["type"] == "DELETED":
                self._gone(manifest["metadata"]["uid"])
                key = await self._left(manifest)
            else:
                key = self._cache.put(manifest)
            if key is not None:
                self._wake(key)
            self._heard(before, manifest)  # last: what cannot be measured is known all the same

        return heard

    def _listed(self, plural: str, namespace: str | None, since: float) -> None:
        """Handle a list that was read again: it lacks what was deleted while nobody watched, and no event will report that."""
        kind = next(kind for _, _, known, kind in (RUNS, *CHILDREN, *OPTIONAL) if known == plural)
        for manifest in self._cache.unheard(kind, namespace, since):
            task = asyncio.create_task(self._verify(manifest))
            self._sweeps.add(task)
            task.add_done_callback(self._sweeps.discard)

    async def _verify(self, manifest: dict[str, Any]) -> None:
        with contextlib.suppress(ApiError):  # the next reconcile of its run finds out, or the next list
            if (key := await self._asked(manifest)) is not None:
                self._wake(key)

    async def _left(self, manifest: dict[str, Any]) -> RunKey | None:
        """Return the run of an object that left the watch: it is gone, or lost its label, which its run has to restore."""
        if manifest["kind"] in (KIND, "Pod"):  # runs are watched without labels, and nobody restores a pod's labels
            return self._cache.remove(manifest)
        try:
            return await self._asked(manifest)
        except ApiError:
            return self._cache.remove(manifest)

    async def _asked(self, manifest: dict[str, Any]) -> RunKey | None:
        """Return the run that is concerned by the current state of an object, as queried from the API server. Raises `ApiError`."""
        metadata = manifest["metadata"]
        try:
            found = await self._client.get(manifest["apiVersion"], manifest["kind"], metadata["namespace"], metadata["name"])
        except Missing:
            return self._cache.remove(manifest, not_found=True)
        return self._cache.put(found)


def _api_version(group: str, version: str) -> str:
    return f"{group}/{version}" if group else version


class _NoMemory(kopf.DiffBaseStorage):
    """kopf compares each object with its last handled state, which takes deep copies; nothing here needs to know what changed."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class _Forgetful(ResourceMemories):
    """kopf keeps a kilobyte for each object, for kinds of handlers that are not used here."""

    async def recall(self, raw_body: RawBody, *, ephemeral: bool = False, **more: Any) -> ResourceMemory:
        return await super().recall(raw_body, ephemeral=True, **more)


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.persistence.diffbase_storage = _NoMemory()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.networking.request_timeout = 30
    settings.watching.chunk_size = 500
    settings.watching.server_timeout = _RECONNECT_SECONDS
    settings.queueing.idle_timeout = _IDLE_SECONDS
    ours = f"{MANAGED_BY}={MANAGED_BY_VALUE}"
    for group, version, plural, _ in (*CHILDREN, *OPTIONAL):
        # A sandbox belongs to its worker; the operator does not look at it.
        settings.watching.label_selectors[group, version, plural] = (
            f"{ours},app.kubernetes.io/component!=sandbox" if plural == "pods" else ours
        )
    return settings
