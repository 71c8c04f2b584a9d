"""Assigns rollouts to workers: leases in object storage, taken by put-if-absent, renewed by compare-and-swap.

No other machine's clock is trusted: a claim has expired when its content has not changed for `lease_seconds` of our own monotonic clock.
A claim only avoids duplicate work. Results are unique because a trajectory can be created only once.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum, auto

import structlog
from pydantic import ValidationError

from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Object, Store, StoreUnavailable
from dagger_operator.store.records import Failure, Record

log = structlog.get_logger(__name__)


class Claim(Record):
    """The object that represents a lease."""

    worker: str
    """Name that stays the same after restarts."""
    holder: str
    """Process that holds the claim, a new id after each restart; empty if the claim was released."""
    beat: int = 0
    """Incremented by every renewal, so that a live claim never looks the same twice."""
    tries: int = 0
    """How often the rollout was started, over all workers."""
    failures: int = 0
    """Tries that failed because of infrastructure."""
    deaths: int = 0
    """Tries whose worker died, stopped renewing or was suspended; a try whose claim was released is not counted."""
    last_failure: Failure | None = None


class LeaseLost(Exception):
    """This rollout is no longer ours: another worker took it over, or the claim was not renewed in time because the store was unavailable
    or this process was suspended. Stop and write nothing more; whoever takes the rollout next restarts it.
    """


class Claims:
    """One worker's view of the claims of one stage."""

    def __init__(self, store: Store, round_number: int, kind: Kind, worker: str, lease_seconds: float) -> None:
        self.store, self.round, self.kind, self.worker, self.lease_seconds = store, round_number, kind, worker, lease_seconds
        self.life = uuid.uuid4().hex
        self._held: set[str] = set()
        self._seen: dict[str, tuple[str, float]] = {}

    async def take(self, rollout_id: str) -> "Lease | None":
        """Return a lease, or None if the rollout is finished or another worker's claim on it is live. Try again later."""
        if rollout_id in self._held:
            return None
        self._held.add(rollout_id)
        lease = None
        try:
            lease = await self._take(rollout_id)
            return lease
        finally:
            if lease is None:
                self._held.discard(rollout_id)

    async def _take(self, rollout_id: str) -> "Lease | None":
        key = layout.claim(self.round, self.kind, rollout_id)
        old = await self.store.get(key)
        claim = _parse(old)
        if old is not None and claim.holder and not self._may_take_over(rollout_id, claim, old):
            return None
        counts = {"tries": claim.tries + 1, "deaths": claim.deaths + bool(claim.holder)}
        mine = claim.model_copy(update={"worker": self.worker, "holder": self.life, "beat": claim.beat + 1, **counts})
        since = time.monotonic()
        made = await self.store.swap(key, _bytes(mine), old)
        if made is None:
            return None
        # Checked only once the claim is ours: no earlier holder can then still finish unnoticed.
        if await self.store.exists(layout.trajectory(self.round, self.kind, rollout_id)):
            await self.store.delete(key)
            return None
        self._seen.pop(rollout_id, None)
        return Lease(self, rollout_id, mine, made, since)

    def _may_take_over(self, rollout_id: str, claim: Claim, now_there: Object) -> bool:
        etag, since = self._seen.get(rollout_id, ("", 0.0))
        if etag == now_there.etag:
            return time.monotonic() - since >= self.lease_seconds
        known = rollout_id in self._seen
        self._seen[rollout_id] = (now_there.etag, time.monotonic())
        # An earlier process of this worker is gone. Only at first sight: two processes with one name must not keep stealing the claim.
        return claim.worker == self.worker and not known

    def _let_go(self, rollout_id: str, rival: Object | None = None) -> None:
        self._held.discard(rollout_id)
        if rival is not None:
            self._seen[rollout_id] = (rival.etag, time.monotonic())


class _State(Enum):
    HELD = auto()
    """Until it is released, taken over, or expires."""
    TAKEN = auto()
    """Taken by another worker, or gone."""
    RELEASED = auto()


class Lease:
    """A rollout that is ours until its claim expires; every renewal extends it."""

    def __init__(self, claims: Claims, rollout_id: str, claim: Claim, there: Object, since: float) -> None:
        self.rollout_id = rollout_id
        self.broken_by: Failure | None = None
        """The infrastructure failure that broke this try; counted when the rollout is released."""
        self._claims, self._claim, self._there = claims, claim, there
        self._state = _State.HELD
        self._until = since + claims.lease_seconds
        self._body = asyncio.timeout_at(self._until)

    @property
    def tries(self) -> int:
        """How often this rollout was started, including this time, over all workers and restarts."""
        return self._claim.tries

    @property
    def failures(self) -> int:
        """Earlier tries that failed because of infrastructure."""
        return self._claim.failures

    @property
    def deaths(self) -> int:
        """Earlier tries whose worker died or stopped renewing."""
        return self._claim.deaths

    @property
    def lost(self) -> bool:
        """Whether it ceased to be ours before it was released.

        It has expired by our own clock, even if nobody took it: a process that was suspended (stopped, frozen, swapped out) finds on
        waking that its deadlines have passed, in any order with our renewals, and resulting timeouts are not the agent's fault.
        """
        over = self._body.expired() or time.monotonic() >= self._until
        return self._state is _State.TAKEN or (self._state is _State.HELD and over)

    def check(self) -> None:
        """Raise `LeaseLost` if the lease is lost. Call it before recording anything that was done under the lease."""
        if self.lost:
            raise self._loss()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Renew the claim while the block runs, and release it at the end if it is still held. If the claim is lost, the block is cancelled
        and raises `LeaseLost`. Use it only once."""
        heart = asyncio.create_task(self._beat(), name=f"lease {self.rollout_id}")
        try:
            async with self._body:
                yield
            self.check()
        except TimeoutError:
            self.check()
            raise  # the block's own
        finally:
            heart.cancel()
            try:
                await self.release()
            except (LeaseLost, StoreUnavailable) as problem:
                # The block's own outcome matters more; the claim expires by itself.
                log.warning("claim not given back", rollout=self.rollout_id, problem=str(problem))
            finally:
                self._claims._let_go(self.rollout_id)

    async def renew(self) -> None:
        """Renew the claim. Raises `LeaseLost` if it is no longer ours, `StoreUnavailable` if the store is unavailable."""
        self.check()
        since = time.monotonic()
        await self._replace(self._claim.model_copy(update={"beat": self._claim.beat + 1}))
        self.check()  # a late answer renews nothing
        self._until = since + self._claims.lease_seconds

    async def release(self) -> None:
        """Release the rollout, so that anyone can take it at once, and count what broke it; delete the claim if the rollout is finished."""
        if self._state is _State.RELEASED or self.lost:
            return
        key = layout.claim(self._claims.round, self._claims.kind, self.rollout_id)
        done = layout.trajectory(self._claims.round, self._claims.kind, self.rollout_id)
        if self.broken_by is None and await self._claims.store.exists(done):
            await self._claims.store.delete(key)
        else:
            update = {"holder": "", "beat": self._claim.beat + 1}
            if self.broken_by is not None:
                update |= {"failures": self._claim.failures + 1, "last_failure": self.broken_by}
            await self._replace(self._claim.model_copy(update=update))
        self._state = _State.RELEASED
        self._claims._let_go(self.rollout_id)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._claims.lease_seconds / 3)
            try:
                await self.renew()
                self._body.reschedule(self._until)
            except LeaseLost:
                if not self._body.expired():
                    self._body.reschedule(0)  # now
                return
            except StoreUnavailable as problem:
                log.warning("claim not renewed", rollout=self.rollout_id, problem=str(problem))

    async def _replace(self, claim: Claim) -> None:
        key = layout.claim(self._claims.round, self._claims.kind, self.rollout_id)
        while True:
            there = await self._claims.store.swap(key, _bytes(claim), self._there)
            if there is not None:
                self._claim, self._there = claim, there
                return
            current = await self._claims.store.get(key)
            if current is None or _parse(current).holder != self._claims.life:
                self._state = _State.TAKEN
                self._claims._let_go(self.rollout_id, current)
                raise self._loss()
            # A renewal that we had given up on arrived after all: continue from it.
            self._there = current
            claim = claim.model_copy(update={"beat": _parse(current).beat + 1})

    def _loss(self) -> LeaseLost:
        return LeaseLost(f"the claim on rollout {self.rollout_id} is no longer {self._claims.worker}'s: taken over, or not renewed in time")


def _parse(there: Object | None) -> Claim:
    if there is None:
        return Claim(worker="", holder="")
    try:
        return Claim.model_validate_json(there.data)
    except ValidationError:
        # Corrupted by hand or by a bug: treated as released; only its counts are lost.
        return Claim(worker="", holder="")


def _bytes(claim: Claim) -> bytes:
    return claim.model_dump_json().encode()
