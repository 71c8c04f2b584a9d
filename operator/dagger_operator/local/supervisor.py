"""Works on one run until it is over: observe, plan, apply, save the status; repeat when something changes."""

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import structlog

from dagger_operator.api import DAggerRun, Phase, RunStatus
from dagger_operator.control import Observed, Results, children, plan, read_progress, read_results
from dagger_operator.local.acceptance import as_used_here
from dagger_operator.local.environment import inherited, storage_credentials
from dagger_operator.local.folder import RunFolder
from dagger_operator.local.machine import Machine, Place
from dagger_operator.store.credentials import own_identity
from dagger_operator.store.objects import DamagedObject, Store, StoreUnavailable

log = structlog.get_logger()

LONGEST_SLEEP = 5.0
"""Seconds after which the run is observed again even without an event."""
RESTING = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.SUSPENDED})
"""Phases in which a run holds nothing and needs nothing."""


class Supervisor:
    """The operator's local counterpart, for one run, whose folder the caller has locked."""

    def __init__(self, folder: RunFolder, watch: Callable[[DAggerRun], None] = lambda _: None) -> None:
        self._folder = folder
        self._own = own_identity()
        self._watch = watch
        self._results = Results()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Ask `run` to stop its processes and return; the run continues when it is supervised again."""
        self._stop.set()

    async def run(self) -> RunStatus:
        """Return the status with which the run ended, or which it had when `stop` was called."""
        run = self._folder.require()
        secrets = self._folder.secrets()
        environment = inherited({**os.environ, **self._own.environ}, identity=run.spec.storage.secret_ref is None)
        credentials = storage_credentials(run, secrets, self._own)
        store = await asyncio.to_thread(Store.open, run.spec.storage, credentials)
        async with Machine(self._place(run, environment, secrets)) as machine:
            while True:
                machine.changed.clear()
                observed = await self._observe(run, machine, store)
                planned = plan(as_used_here(run), observed)
                run = self._say(run, planned.status)
                machine.apply(planned.objects)
                for reference_to in planned.remove:
                    machine.remove(reference_to.kind, reference_to.name)
                rests = planned.status.phase in RESTING and not any(child.pods for child in observed.children)
                if rests or self._stop.is_set():
                    return planned.status
                await self._sleep(machine, planned.requeue_after)

    async def _observe(self, run: DAggerRun, machine: Machine, store: Store) -> Observed:
        # Children before results: if a Job is seen to be done, its result is already in storage.
        shown = machine.observed()
        seen = children((manifest for manifest, _ in shown), (pod for _, pods in shown for pod in pods), datetime.now(UTC))
        problem = None
        try:
            self._results = await read_results(store, run, self._results)
        except (StoreUnavailable, DamagedObject) as error:
            problem = str(error)
        progress = await read_progress(store, run, self._results)
        return Observed(datetime.now(UTC), seen, self._results, storage_problem=problem, progress=progress)

    def _say(self, run: DAggerRun, status: RunStatus) -> DAggerRun:
        """Save the status if it changed, and show the run."""
        if status != run.status:
            if run.status is None or status.phase is not run.status.phase or status.round != run.status.round:
                log.info("phase", phase=status.phase, round=status.round, reason=status.reason)
            run = run.model_copy(update={"status": status})
            self._folder.save(run)
        self._watch(run)
        return run

    async def _sleep(self, machine: Machine, requeue_after: float | None) -> None:
        seconds = LONGEST_SLEEP if requeue_after is None else min(requeue_after, LONGEST_SLEEP)
        waits = [asyncio.create_task(machine.changed.wait()), asyncio.create_task(self._stop.wait())]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await wait

    def _place(self, run: DAggerRun, environment: Mapping[str, str], secrets: Mapping[str, Mapping[str, str]]) -> Place:
        scope = run.metadata.uid or run.metadata.name
        # Pods' volumes hold Unix sockets, whose paths are limited to 107 bytes: the folder's own path may be too long.
        short = hashlib.blake2b(f"{self._folder.path}{scope}".encode(), digest_size=6).hexdigest()
        folder = Path(os.environ.get("TMPDIR", tempfile.gettempdir())) / f"dagger-{short}"
        return Place(scope=scope, folder=folder, logs=self._folder.logs, environment=environment, secrets=secrets)
