"""Builds `Observed` for a plan from the cache, the API server's warnings and object storage."""

from datetime import UTC, datetime

from dagger_operator.api import DAggerRun
from dagger_operator.cluster.cache import Cache, RunKey
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.groups import begun_anew
from dagger_operator.cluster.ownership import own
from dagger_operator.cluster.stores import Stores
from dagger_operator.cluster.warnings import warnings_about
from dagger_operator.control import Observed, Peer, Trouble, children
from dagger_operator.store.objects import DamagedObject, StoreUnavailable


class Observer:
    def __init__(self, cache: Cache, client: Client, stores: Stores, scrapers: tuple[Peer, ...]) -> None:
        self._cache, self._client, self._stores, self._scrapers = cache, client, stores, scrapers

    async def observe(self, run: DAggerRun, refused: Trouble | None) -> Observed:
        """Read children before results: a Job that is observed as done has its result in storage by then."""
        objects, pods = own(run, self._cache.children(RunKey(run.metadata.namespace, run.metadata.name)))
        now = datetime.now(UTC)
        warnings = await warnings_about(self._client, objects, pods, now)
        seen = children(objects, pods, now, warnings, await begun_anew(self._client, objects))
        try:
            results, progress = await self._stores.read(run)
        except (StoreUnavailable, DamagedObject) as error:
            return Observed(datetime.now(UTC), seen, storage_problem=str(error), refused=refused)
        return Observed(datetime.now(UTC), seen, results, refused=refused, progress=progress, scrapers=self._scrapers)
