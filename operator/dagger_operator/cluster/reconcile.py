"""One run, from observation to desired state: read it from top to bottom.

It gets a key, never what happened. It may be killed at any line and called again; a second call does nothing.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from dagger_operator.api import DEFAULT_MANAGER, KIND, DAggerRun, InvalidRun, Phase, RunStatus, load
from dagger_operator.cluster.apply import Applier
from dagger_operator.cluster.cache import Cache, RunKey
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.events import Teller
from dagger_operator.cluster.observe import Observer
from dagger_operator.cluster.settings import Settings
from dagger_operator.cluster.stores import Stores
from dagger_operator.control import Event, Observed, Plan, Trouble, news, plan, refused
from dagger_operator.control.plan import LOOK_AGAIN
from dagger_operator.control.refusals import dated, failed_by

log = structlog.get_logger()

RESTING = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.SUSPENDED})
"""Phases in which storage is not polled."""
AGAIN_AFTER_REFUSAL = 10.0
"""Seconds until what the API server refused is retried."""
LOOKS_A_SECOND = 50.0
"""Periodic reconciles per second, over all runs. Up to 500 runs are reconciled every ten seconds, a thousand every twenty."""
SPREAD_SECONDS = 3.0
"""Maximum seconds by which a reconcile may randomly come earlier: runs created together should not be reconciled together forever."""

Manifest = Mapping[str, Any]
Section = TypeVar("Section", bound=BaseModel)


class Reconciler:
    def __init__(self, settings: Settings, cache: Cache, client: Client) -> None:
        self._settings, self._cache, self._client = settings, cache, client
        self._stores = Stores(client)
        self._observer = Observer(cache, client, self._stores, settings.scrapers)
        self.applier = Applier(client, cache)
        self._teller = Teller(client)
        self._refused: dict[RunKey, Trouble] = {}
        self._read: dict[RunKey, tuple[str, DAggerRun]] = {}

    async def close(self) -> None:
        await self._stores.close()

    async def reconcile(self, key: RunKey) -> float | None:
        """Return the seconds until the next call; None: when something changes. Raises `ApiError` if it has to be retried."""
        stored = self._cache.run(key)
        if stored is None or not _is_ours(stored):
            self._forget(key)
            return None
        try:
            run = self._run(key, stored)
        except InvalidRun as error:
            before = _understood(stored.get("status"))
            status = refused(stored["metadata"].get("generation"), before, error.problems, datetime.now(UTC))
            await self._say(stored, before, status, news(before, status))
            return None

        observed = await self._observer.observe(run, self._refused.get(key) or failed_by(run.status))
        planned = plan(run, observed)
        refusal = await self._carry_out(key, run, planned, observed)
        if refusal != observed.refused:
            planned = plan(run, replace(observed, refused=refusal))
        written = await self._say(stored, run.status, planned.status, planned.events)

        if planned.expired:
            await self._delete(written)
        if planned.status.phase is Phase.SUCCEEDED or (planned.status.phase in RESTING and observed.storage_problem is None):
            self._stores.forget(key)  # except the record of unavailable storage, which is polled
            self._read.pop(key, None)
        after = planned.requeue_after if refusal is None else AGAIN_AFTER_REFUSAL
        return paced(after, self._cache.count(KIND), random.random())  # noqa: S311 - it spreads reconciles; guessing it gains nothing

    def _run(self, key: RunKey, stored: Manifest) -> DAggerRun:
        """Return the run, parsed once for each of its versions: that is a third of a reconcile in which nothing is to be done. Raises
        `InvalidRun`."""
        version = f"{stored['metadata']['uid']}/{stored['metadata']['resourceVersion']}"
        read = self._read.get(key)
        if read is not None and read[1].metadata.uid != stored["metadata"]["uid"]:
            self._forget(key)  # another run of the same name
        if read is None or read[0] != version:
            read = self._read[key] = version, completed(_loaded(stored), self._settings)
        return read[1]

    async def _carry_out(self, key: RunKey, run: DAggerRun, planned: Plan, observed: Observed) -> Trouble | None:
        """Apply, remove and dry-run what is planned. Returns the first refusal, dated by its first occurrence; everything else planned is
        done regardless."""
        refusals = [trouble for one in planned.objects if (trouble := await self.applier.apply(run, one)) is not None]
        refusals += [trouble for ref in planned.remove if (trouble := await self.applier.remove(run, ref)) is not None]
        refusals += [trouble for one in planned.asked if (trouble := await self.applier.apply(run, one, dry_run=True)) is not None]
        if refusals:
            self._refused[key] = dated(refusals[0], self._refused.get(key), run.status)
            return self._refused[key]
        if observed.storage_problem is None:  # otherwise nothing was applied, and nothing accepted
            self._refused.pop(key, None)
        return None

    async def _say(self, stored: Manifest, known: RunStatus | None, status: RunStatus, events: Sequence[Event]) -> Manifest:
        """Write the status if it differs, unless the run changed meanwhile (`Conflict`); then emit what is new in it. Returns the run as it
        was read, with its current status."""
        if status == known or stored["metadata"].get("deletionTimestamp") is not None:
            return stored
        metadata = {name: stored["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        head = {"apiVersion": stored["apiVersion"], "kind": stored["kind"], "metadata": metadata}
        written = await self._client.apply({**head, "status": status.wire()}, "status")
        self._cache.put(written)
        before = known or RunStatus()
        if (before.phase, before.round, before.reason) != (status.phase, status.round, status.reason):
            log.info(
                "run", namespace=metadata["namespace"], name=metadata["name"], phase=status.phase, round=status.round, reason=status.reason
            )
        for event in events:
            await self._teller.tell(written, event)
        return written

    async def _delete(self, stored: Manifest) -> None:
        """Delete a run whose time to live is over; not if somebody changed it since it was read."""
        metadata = stored["metadata"]
        preconditions = {name: metadata[name] for name in ("uid", "resourceVersion")}
        await self._client.delete(
            stored["apiVersion"],
            stored["kind"],
            metadata["namespace"],
            metadata["name"],
            preconditions=preconditions,
            propagation="Background",
        )
        log.info("deleted, its time to live is over", namespace=metadata["namespace"], name=metadata["name"])

    def _forget(self, key: RunKey) -> None:
        self._stores.forget(key)
        self._refused.pop(key, None)
        self._read.pop(key, None)


def paced(after: float | None, runs: int, dice: float) -> float | None:
    """Return the seconds until a run is reconciled again; `dice` is from 0 to 1.

    A wait of ten seconds or more is longer in a large fleet, and spread; a shorter one is unchanged.
    """
    return after if after is None or after < LOOK_AGAIN else max(after, runs / LOOKS_A_SECOND) - SPREAD_SECONDS * dice


def completed(run: DAggerRun, settings: Settings) -> DAggerRun:
    """Return the run with the operator's settings where the spec leaves them open; they are never written back."""
    sandbox = _filled(run.spec.sandbox, namespace=settings.sandbox_namespace, helper_image=settings.helper_image)
    sandbox = sandbox.model_copy(update={"pod": _filled(sandbox.pod, priority_class_name=settings.sandbox_priority_class)})
    training = _filled(run.spec.training, image=settings.trainer_image)
    spec = _filled(run.spec, image=settings.worker_image).model_copy(update={"sandbox": sandbox, "training": training})
    return run.model_copy(update={"spec": spec})


def _filled(section: Section, **own: str | None) -> Section:
    return section.model_copy(update={name: value for name, value in own.items() if getattr(section, name) is None})


def _is_ours(stored: Manifest) -> bool:
    """Whether this operator manages the run. Checked before it is parsed: what we do not understand may be another controller's format."""
    return ((stored.get("spec") or {}).get("managedBy") or DEFAULT_MANAGER) == DEFAULT_MANAGER


def _loaded(stored: Manifest) -> DAggerRun:
    """Return the run as stored. A status that another version wrote and that is not understood is ignored; such a spec raises
    `InvalidRun`."""
    status = _understood(stored.get("status"))
    return load({**stored, "status": status.wire() if status else None})


def _understood(status: Any) -> RunStatus | None:
    try:
        return RunStatus.model_validate(status)
    except ValidationError:
        return None
