"""Who may run a rollout, and when another may."""

import asyncio
import time
from collections.abc import Callable

import pytest

from dagger_operator.store import layout
from dagger_operator.store.claims import Claims, Lease, LeaseLost
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Object, Store, StoreUnavailable
from dagger_operator.store.records import Failure, Trajectory
from dagger_operator.store.trajectories import write_trajectory

LONG = 3600.0


def claims(store: Store, worker: str, lease_seconds: float = LONG) -> Claims:
    return Claims(store, 1, Kind.ROLLOUT, worker, lease_seconds)


async def patiently(claims: Claims, rollout_id: str) -> Lease:
    deadline = time.monotonic() + 60
    while (lease := await claims.take(rollout_id)) is None:
        assert time.monotonic() < deadline, "never expired"
        await asyncio.sleep(0.02)
    return lease


async def broke(lease: Lease) -> None:
    lease.broken_by = Failure(reason="SandboxLost", message="gone")
    await lease.release()


async def test_a_claimed_rollout_is_nobody_elses(store: Store) -> None:
    one, other = claims(store, "rollout-0000"), claims(store, "rollout-0001")
    lease = await one.take("r")
    assert lease is not None and (lease.tries, lease.failures) == (1, 0)
    assert await other.take("r") is None
    assert await one.take("r") is None


async def test_of_many_workers_one_gets_it(store: Store) -> None:
    leases = await asyncio.gather(*(claims(store, f"rollout-{number:04d}").take("r") for number in range(16)))
    assert len([lease for lease in leases if lease is not None]) == 1


async def test_a_finished_rollout_is_never_claimed_again(store: Store, rollout: Callable[..., Trajectory]) -> None:
    one = claims(store, "rollout-0000")
    lease = await one.take("r")
    assert lease is not None
    await write_trajectory(store, Kind.ROLLOUT, rollout("r"))
    await lease.release()
    assert await one.take("r") is None and await claims(store, "rollout-0001").take("r") is None
    assert await store.list(layout.claims(1, Kind.ROLLOUT)) == []


async def test_a_silent_worker_loses_its_claim_and_the_try_is_counted(store: Store) -> None:
    assert await claims(store, "rollout-0000").take("r") is not None
    rival = claims(store, "rollout-0001", lease_seconds=0.3)
    assert await rival.take("r") is None, "a claim seen for the first time may be a living one"
    lease = await patiently(rival, "r")
    assert (lease.tries, lease.failures, lease.deaths) == (2, 0, 1)


async def test_a_worker_that_renews_keeps_its_claim(store: Store) -> None:
    lease = await claims(store, "rollout-0000", lease_seconds=2).take("r")
    rival = claims(store, "rollout-0001", lease_seconds=2.5)
    assert lease is not None
    async with lease.kept():
        until = time.monotonic() + 3.5
        while time.monotonic() < until:
            assert await rival.take("r") is None
            await asyncio.sleep(0.05)


async def test_a_restarted_worker_takes_its_own_claim_over_at_once(store: Store) -> None:
    assert await claims(store, "rollout-0000").take("r") is not None
    lease = await claims(store, "rollout-0000").take("r")
    assert lease is not None and (lease.tries, lease.deaths) == (2, 1)


async def test_two_lives_under_one_name_do_not_steal_in_turns(store: Store) -> None:
    old, new = claims(store, "rollout-0000"), claims(store, "rollout-0000")
    first = await old.take("r")
    assert first is not None and await new.take("r") is not None
    with pytest.raises(LeaseLost):
        await first.renew()
    assert await old.take("r") is None


async def test_infrastructure_failures_are_counted_over_workers_and_lives(store: Store) -> None:
    for number in range(4):
        lease = await claims(store, f"rollout-{number % 2:04d}").take("r")
        assert lease is not None and (lease.tries, lease.failures) == (number + 1, number)
        await broke(lease)


async def test_leaving_the_block_gives_the_claim_back_uncounted(store: Store) -> None:
    with pytest.raises(RuntimeError, match="bug"):
        async with (await patiently(claims(store, "rollout-0000"), "r")).kept():
            raise RuntimeError("bug")
    lease = await claims(store, "rollout-0001").take("r")
    assert lease is not None and (lease.tries, lease.failures, lease.deaths) == (2, 0, 0)


async def test_cancelling_the_body_stays_a_cancellation_and_gives_back(store: Store) -> None:
    lease = await patiently(claims(store, "rollout-0000"), "r")

    async def body() -> None:
        async with lease.kept():
            await asyncio.sleep(LONG)

    task = asyncio.create_task(body())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await claims(store, "rollout-0001").take("r") is not None


async def test_a_worker_that_was_overtaken_is_stopped(store: Store) -> None:
    lease = await patiently(claims(store, "rollout-0000", lease_seconds=1.5), "r")
    went_on = False
    with pytest.raises(LeaseLost, match="rollout r"):
        async with lease.kept():
            await patiently(claims(store, "rollout-0001", lease_seconds=0), "r")
            await asyncio.sleep(60)
            went_on = True
    assert lease.lost and not went_on


async def test_a_worker_that_stood_still_for_longer_than_its_lease_begins_anew(store: Store) -> None:
    mine = claims(store, "rollout-0000", lease_seconds=0.9)
    lease, went_on = await patiently(mine, "r"), False
    with pytest.raises(LeaseLost, match="rollout r"):
        async with lease.kept():
            # Nobody else wanted it; on waking, its renewal is due before the lease is over.
            asyncio.get_running_loop().call_soon(time.sleep, 2.0)
            await asyncio.sleep(2.5)
            went_on = True
    again = await mine.take("r")
    assert lease.lost and not went_on and again is not None and (again.tries, again.deaths) == (2, 1)


async def test_that_a_lease_is_over_is_known_before_any_timer_says_so(store: Store) -> None:
    lease = await patiently(claims(store, "rollout-0000", lease_seconds=0.3), "r")
    with pytest.raises(LeaseLost):
        async with lease.kept():
            lease.check()
            time.sleep(0.5)
            lease.check()
            pytest.fail("what was done would be written down")


async def test_what_the_block_itself_raises_is_not_taken_for_a_loss(store: Store) -> None:
    lease = await patiently(claims(store, "rollout-0000"), "r")
    with pytest.raises(TimeoutError):
        async with lease.kept(), asyncio.timeout(0.01):
            await asyncio.sleep(LONG)
    assert not lease.lost and await claims(store, "rollout-0001").take("r") is not None


async def test_an_overtaken_worker_does_not_free_the_claim_of_the_next(store: Store) -> None:
    lease = await patiently(claims(store, "rollout-0000"), "r")
    await patiently(claims(store, "rollout-0001", lease_seconds=0), "r")
    with pytest.raises(LeaseLost):
        await broke(lease)
    assert await claims(store, "rollout-0002").take("r") is None


async def test_a_garbled_claim_is_free(store: Store) -> None:
    await store.put(layout.claim(1, Kind.ROLLOUT, "r"), b"\0 not json")
    assert await claims(store, "rollout-0000").take("r") is not None


class Outage(Store):
    """A real store whose writes fail while `away`, and may have happened nevertheless."""

    away = False
    written_all_the_same = False

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        if not self.away or self.written_all_the_same:
            made = await super().swap(key, data, expected)
        if self.away:
            raise StoreUnavailable("no answer")
        return made


def outage(store: Store) -> Outage:
    return Outage(store._backend, store.url, scheme=store._scheme, prefix=store._prefix, folder=store._folder)


async def test_a_store_that_is_away_longer_than_the_lease_stops_the_worker(store: Store) -> None:
    away = outage(store)
    with pytest.raises(LeaseLost):
        async with (await patiently(claims(away, "rollout-0000", lease_seconds=0.3), "r")).kept():
            away.away = True
            await asyncio.sleep(60)


async def test_a_renewal_whose_answer_was_lost_does_not_lose_the_claim(store: Store) -> None:
    away = outage(store)
    lease = await patiently(claims(away, "rollout-0000"), "r")
    away.away = away.written_all_the_same = True
    with pytest.raises(StoreUnavailable):
        await lease.renew()
    away.away = False
    await lease.renew()
    await broke(lease)
    again = await claims(store, "rollout-0001").take("r")
    assert again is not None and again.failures == 1
