"""One worker's share of a stage's rollouts: claim, run and record, until all are finished by some worker."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog
from structlog.contextvars import bound_contextvars

from dagger_operator.rollout.metrics import WorkerMetrics
from dagger_operator.rollout.outcome import InfrastructureFailed
from dagger_operator.store import progress
from dagger_operator.store.claims import Claims, Lease, LeaseLost
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Store, StoreUnavailable
from dagger_operator.store.records import Failure, Outcome, Trajectory
from dagger_operator.store.results import StageProgress
from dagger_operator.store.trajectories import finished, write_trajectory
from dagger_operator.tasks.deal import Assignment

log = structlog.get_logger(__name__)
MOST_DEATHS = 5
"""A rollout with more worker deaths than this is excluded: it may be what kills them. A stage of one worker then uses no more pods than its
own retries allow (`control.failures.RETRIES`), and one rollout is unlikely to lose its node this often."""


@dataclass(frozen=True)
class Share:
    """What a worker works on, and its limits."""

    store: Store
    round: int
    kind: Kind
    worker: str
    index: int
    workers: int
    assignments: tuple[Assignment, ...]
    """All rollouts of the stage, the same for every worker."""
    concurrency: int
    lease_seconds: float
    retries: int
    """Further tries of a rollout that infrastructure broke."""
    most_backoff_seconds: float = 30.0
    """Longest pause of a slot after consecutive failures: an endpoint that is down must not use up every rollout's tries in a minute."""


class Pool:
    """One worker's slots. `attempt` runs a rollout once or raises `InfrastructureFailed`; `excluded` returns the record of a rollout that
    failed its last try; `recovered` waits, after a broken try, until the run's policies are available, or raises `StageFailure`."""

    def __init__(
        self,
        share: Share,
        metrics: WorkerMetrics,
        attempt: Callable[[Assignment, int], Awaitable[Trajectory]],
        excluded: Callable[[Assignment, int, Failure], Trajectory],
        recovered: Callable[[], Awaitable[None]],
    ) -> None:
        self._share, self._metrics, self._attempt, self._excluded, self._recovered = share, metrics, attempt, excluded, recovered
        self._claims = Claims(share.store, share.round, share.kind, share.worker, share.lease_seconds)
        self._under_way: set[str] = set()
        self._waiting: deque[Assignment] = deque()
        self._sweep = asyncio.Lock()
        self._swept = False
        self._failures_in_a_row = 0
        self._counts: Counter[str] = Counter()
        self._started = time.monotonic()
        self._before: int | None = None

    async def run(self) -> None:
        """Return when every rollout is finished. Raises `StoreUnavailable`, `StageFailure`; if cancelled, it releases its claims."""
        slots = [asyncio.create_task(self._slot()) for _ in range(min(self._share.concurrency, len(self._share.assignments)))]
        reporter = asyncio.create_task(self._report_on())
        try:
            await asyncio.gather(*slots)
        finally:
            for task in (*slots, reporter):
                if not task.cancelling():  # otherwise it is already releasing its claim, which a second cancellation would stop
                    task.cancel()
            await asyncio.gather(*slots, reporter, return_exceptions=True)
        await self._report()

    async def _slot(self) -> None:
        while (claimed := await self._next()) is not None:
            assignment, lease = claimed
            try:
                with bound_contextvars(task=assignment.task.id, rollout=assignment.rollout_id, tries=lease.tries):
                    await self._work(assignment, lease)
            finally:
                self._under_way.discard(assignment.rollout_id)

    async def _next(self) -> tuple[Assignment, Lease] | None:
        """Claim and return the next rollout; None if all open ones are in progress in this worker, each in its own slot."""
        while True:
            if not self._waiting:
                async with self._sweep:
                    if not self._waiting and not await self._look_again():
                        return None
            if not self._waiting:
                continue
            assignment = self._waiting.popleft()
            if assignment.rollout_id in self._under_way:
                continue
            self._under_way.add(assignment.rollout_id)
            lease = None
            try:
                lease = await self._claims.take(assignment.rollout_id)
            finally:
                if lease is None:
                    self._under_way.discard(assignment.rollout_id)
            if lease is not None:
                return assignment, lease

    async def _look_again(self) -> bool:
        """Queue the rollouts that are open and not in progress here; pauses between sweeps so that other workers can finish or expire."""
        if self._swept:
            if not await self._open():
                return False
            await asyncio.sleep(min(5.0, self._share.lease_seconds / 4))
        self._swept = True
        self._waiting.extend(await self._open())
        return bool(self._waiting)

    async def _open(self) -> Sequence[Assignment]:
        done = await finished(self._share.store, self._share.round, self._share.kind)
        everything = self._share.assignments
        # Workers start at different positions, so that they seldom compete for the same claim.
        start = self._share.index * len(everything) // max(1, self._share.workers)
        return [a for a in everything[start:] + everything[:start] if a.rollout_id not in done and a.rollout_id not in self._under_way]

    async def _work(self, assignment: Assignment, lease: Lease) -> None:
        """Run one try at a claimed rollout: record it if it ended, release it if infrastructure broke it and tries are left."""
        try:
            async with lease.kept():
                started = time.monotonic()
                with self._metrics.under_way.track_inprogress():
                    trajectory, failure = await self._try(assignment, lease)
                self._metrics.tried(time.monotonic() - started, failure.reason if failure else None)
                if failure is not None:
                    # While holding the lease: with a policy down, nobody spends another try on this rollout.
                    await self._recovered()
                lease.check()  # a worker that was suspended past its lease must not record an end
                if trajectory is None:
                    lease.broken_by = failure
                elif await write_trajectory(self._share.store, self._share.kind, trajectory):
                    self._count(trajectory)
        except LeaseLost as error:
            log.warning("rollout starts over, here or elsewhere", problem=str(error))
            return
        self._failures_in_a_row = 0 if failure is None else self._failures_in_a_row + 1
        if failure is not None:
            await asyncio.sleep(min(self._share.most_backoff_seconds, 0.5 * 2 ** min(self._failures_in_a_row - 1, 16)))

    async def _try(self, assignment: Assignment, lease: Lease) -> tuple[Trajectory | None, Failure | None]:
        if last := lease.deaths > MOST_DEATHS:
            failure = Failure(reason="WorkerDied", message=f"its worker died {lease.deaths} times")
        else:
            try:
                return await self._attempt(assignment, lease.tries), None
            except InfrastructureFailed as error:
                failure = error.failure
            last = lease.failures >= self._share.retries
        self._counts["broken_tries"] += 1
        log.warning("infrastructure broke a rollout", reason=failure.reason, problem=failure.message, excluded=last)
        return (self._excluded(assignment, lease.tries, failure) if last else None), failure

    def _count(self, trajectory: Trajectory) -> None:
        self._metrics.ended(trajectory.outcome)
        self._counts[trajectory.outcome.value] += 1
        self._counts["turns"] += len(trajectory.turns)
        self._counts["labels"] += sum(turn.label is not None and turn.label_flaw is None for turn in trajectory.turns)
        log.info("rollout finished", outcome=trajectory.outcome.value, exit_status=trajectory.exit_status, turns=len(trajectory.turns))

    async def _report_on(self) -> None:
        while True:
            await self._report()
            await asyncio.sleep(progress.REPORT_SECONDS)

    async def _report(self) -> None:
        """Report stage progress (`done`, `total`) and what this worker has done since it started (`counters`, summed over workers)."""
        share, seconds = self._share, time.monotonic() - self._started
        counters: dict[str, float] = {outcome.value: self._counts[outcome.value] for outcome in Outcome if self._counts[outcome.value]}
        counters |= {name: self._counts[name] for name in ("turns", "labels", "broken_tries")}
        counters |= {"turns_per_second": self._counts["turns"] / seconds if seconds else 0.0, "under_way": len(self._under_way)}
        try:
            done = len(await finished(share.store, share.round, share.kind) & {a.rollout_id for a in share.assignments})
        except StoreUnavailable as error:
            log.warning("progress not known", problem=str(error))
            return
        self._before = done if self._before is None else self._before
        total = len(share.assignments)
        state = StageProgress(done=done, total=total, unit="rollouts", counters=counters, seconds=seconds, before=self._before)
        await progress.report(share.store, share.round, share.kind.value, share.index, state)
