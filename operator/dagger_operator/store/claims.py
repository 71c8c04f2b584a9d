"""Which worker runs which rollout: leases in object storage, taken by put-if-absent, kept by compare-and-swap.

No clock of another machine is trusted: a claim has expired when its content stood still for `lease_seconds` of our own monotonic
clock. A claim only saves work. What keeps results single is that a trajectory is created once.
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
    """The object that stands for a lease."""

    worker: str
    """Name that outlives restarts."""
    holder: str
    """This life of the worker; empty where the claim was given back."""
    beat: int = 0
    """Grows with every renewal, so that a living claim never looks the same twice."""
    tries: int = 0
    """Times that the rollout was started, over all workers."""
    failures: int = 0
    """Tries that infrastructure broke."""
    deaths: int = 0
    """Tries whose worker died, fell silent or stood still over them; one that gave its claim back did not."""
    last_failure: Failure | None = None


class LeaseLost(Exception):
    """This rollout is no longer ours: another worker took it over, or the claim was not renewed for as long as it lasts, since the store
    was away or this process stood still. Stop, write nothing more; who finds it free begins anew.
    """


class Claims:
    """One worker's view of one stage's claims."""

    def __init__(self, store: Store, round_number: int, kind: Kind, worker: str, lease_seconds: float) -> None:
        self.store, self.round, self.kind, self.worker, self.lease_seconds = store, round_number, kind, worker, lease_seconds
        self.life = uuid.uuid4().hex
        self._held: set[str] = set()
        self._seen: dict[str, tuple[str, float]] = {}

    async def take(self, rollout_id: str) -> "Lease | None":
        """A lease, or None where the rollout is finished or another worker's claim on it still moves. Ask again later."""
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
        # Looked at after the claim is ours: nobody who held it before can still be about to finish unseen.
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
        # A worker's former life is gone. Only at first sight: two lives at once under one name must not steal in turns.
        return claim.worker == self.worker and not known

    def _let_go(self, rollout_id: str, rival: Object | None = None) -> None:
        self._held.discard(rollout_id)
        if rival is not None:
            self._seen[rollout_id] = (rival.etag, time.monotonic())


class _State(Enum):
    HELD = auto()
    """Until it is given back, taken over, or its time is over."""
    TAKEN = auto()
    """By another, or it is gone."""
    RELEASED = auto()


class Lease:
    """A rollout that is ours for as long as a claim lasts, and longer by every renewal."""

    def __init__(self, claims: Claims, rollout_id: str, claim: Claim, there: Object, since: float) -> None:
        self.rollout_id = rollout_id
        self.broken_by: Failure | None = None
        """What of infrastructure broke this try: counted when the rollout is given back."""
        self._claims, self._claim, self._there = claims, claim, there
        self._state = _State.HELD
        self._until = since + claims.lease_seconds
        self._body = asyncio.timeout_at(self._until)

    @property
    def tries(self) -> int:
        """Times that this rollout was started, this one included, over all workers and restarts."""
        return self._claim.tries

    @property
    def failures(self) -> int:
        """Earlier tries that infrastructure broke."""
        return self._claim.failures

    @property
    def deaths(self) -> int:
        """Earlier tries whose worker died or fell silent."""
        return self._claim.deaths

    @property
    def lost(self) -> bool:
        """Whether it ceased to be ours before it was given back.

        Its time is over by our own clock, even where nobody took it: a process that stood still (stopped, frozen, swapped out) finds on
        waking that its deadlines have passed, in any order with our renewals, and what they say is not the agent's doing.
        """
        over = self._body.expired() or time.monotonic() >= self._until
        return self._state is _State.TAKEN or (self._state is _State.HELD and over)

    def check(self) -> None:
        """Raises `LeaseLost` where it is lost. Call it before what was done under the lease is written down."""
        if self.lost:
            raise self._loss()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Renews the claim while the block runs, and gives back what is still held at its end. A block whose claim is lost is cancelled and
        raises `LeaseLost`. To be used once."""
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
                # The block's own end matters more; the claim expires by itself.
                log.warning("claim not given back", rollout=self.rollout_id, problem=str(problem))
            finally:
                self._claims._let_go(self.rollout_id)

    async def renew(self) -> None:
        """Moves the claim on; raises `LeaseLost` where it is no longer ours, `StoreUnavailable` where the store is away."""
        self.check()
        since = time.monotonic()
        await self._replace(self._claim.model_copy(update={"beat": self._claim.beat + 1}))
        self.check()  # an answer that comes too late renews nothing
        self._until = since + self._claims.lease_seconds

    async def release(self) -> None:
        """Gives the rollout back: at once free for anyone, with what broke it counted; the claim goes where the rollout is finished."""
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
            # A renewal that we gave up waiting for arrived after all: go on from there.
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
        # Garbled by hand or by a fault: as good as given back, only its counts are gone.
        return Claim(worker="", holder="")


def _bytes(claim: Claim) -> bytes:
    return claim.model_dump_json().encode()
