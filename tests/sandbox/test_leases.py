"""Whose Lease goes: one that nobody renews while somebody looks on, whatever clocks say and however long nobody could look."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.kube import Kube
from dagger_operator.sandbox.pod_manifest import Setting
from dagger_operator.sandbox.worker_lease import DURATION_SECONDS, Witness, WorkerLease
from fixtures.api_server import ApiServer, refusal


def lease(name: str, version: int, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": name, "resourceVersion": str(version)}, "spec": {"leaseDurationSeconds": 60, **spec}}


def names(leases: list[dict[str, Any]]) -> list[str]:
    return [one["metadata"]["name"] for one in leases]


class Watch:
    """A witness that looks every ten seconds of a clock of the test's own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.witness = Witness(10, lambda: self.now)

    def look(self, *leases: dict[str, Any], after: float = 10.0, grace: float = 0.0) -> list[str]:
        self.now += after
        return names(self.witness.dead(leases, grace=grace))


@given(grace=st.sampled_from([0.0, 60.0]), duration=st.integers(1, DURATION_SECONDS))
def test_a_lease_that_stands_still_is_dead_once_it_did_so_for_longer_than_it_lasts(grace: float, duration: int) -> None:
    watch, stale = Watch(), lease("stale", 1, leaseDurationSeconds=duration)
    for looks in range(30):
        found = watch.look(stale, lease("living", looks), grace=grace)
        assert found == (["stale"] if 10 * looks > duration + grace else [])


def test_what_a_lease_says_of_the_time_counts_for_nothing() -> None:
    watch = Watch()
    for version in range(30):
        assert not watch.look(lease("slow", version, renewTime="1970-01-01T00:00:00Z"))
    for _ in range(7):
        assert not watch.look(lease("fast", 1, renewTime="9999-01-01T00:00:00Z"))
    assert watch.look(lease("fast", 1, renewTime="9999-01-01T00:00:00Z")) == ["fast"]


def test_a_lease_that_says_that_it_lasts_for_decades_is_not_believed() -> None:
    """A worker that was taken over writes what it likes into its Lease, and then is gone."""
    watch, left = Watch(), lease("left", 1, leaseDurationSeconds=2**31 - 1)
    found = [bool(watch.look(left)) for _ in range(9)]
    assert found.index(True) == DURATION_SECONDS // 10 + 1


def test_a_lease_that_says_nothing_lasts_as_long_as_a_workers() -> None:
    watch, silent = Watch(), {"metadata": {"name": "silent", "uid": "u", "resourceVersion": "1"}, "spec": None}
    found = [bool(watch.look(silent)) for _ in range(9)]
    assert found.index(True) == DURATION_SECONDS // 10 + 1


def test_who_could_not_look_begins_anew() -> None:
    watch, stale = Watch(), lease("stale", 1)
    for _ in range(6):
        assert not watch.look(stale)
    assert not watch.look(stale, after=3600), "others could not renew either"
    for _ in range(6):
        assert not watch.look(stale)
    assert watch.look(stale) == ["stale"]


def test_only_leases_that_are_there_are_remembered() -> None:
    watch = Watch()
    for number in range(100):
        watch.look(lease(f"worker-{number}", 1))
    assert len(watch.witness._seen) == 1


def worker(kube: Kube, name: str) -> WorkerLease:
    return WorkerLease(kube, Setting("run", "team", name, f"{name}life", "helper:1", SandboxLimits(), 900), duration=1)


@asynccontextmanager
async def kept(*leases: WorkerLease) -> AsyncIterator[None]:
    for one in leases:
        await one.take()
        await one.sweep()
    keeping = [asyncio.create_task(one.keep()) for one in leases]
    try:
        yield
    finally:
        for task in keeping:
            task.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)


def uids(server: ApiServer) -> set[str]:
    return {one["metadata"]["uid"] for one in server.there("leases")}


async def test_a_dead_workers_lease_goes_and_those_of_the_living_stay() -> None:
    async with ApiServer.running() as (server, kube):
        dead, first, second = (worker(kube, name) for name in ("dead", "first", "second"))
        await dead.take()
        async with kept(first, second), asyncio.timeout(20):
            living = {str(one.manifest["metadata"]["uid"]) for one in (first, second)}
            assert len(uids(server)) == 3, "the look at the start only begins the wait"
            while uids(server) != living:
                await asyncio.sleep(0.05)
            await asyncio.sleep(2)
            assert uids(server) == living


async def test_no_sibling_loses_its_sandboxes_to_the_worker_that_is_back_first_after_an_outage() -> None:
    async with ApiServer.running() as (server, kube):
        first, second = worker(kube, "first"), worker(kube, "second")
        async with kept(first, second):
            before = uids(server)
            await asyncio.sleep(0.5)
            server.fault = lambda _: refusal(503, "ServiceUnavailable", "away")
            await asyncio.sleep(2)
            # The second one is told a little later that the API server is back.
            server.fault = lambda request: (
                refusal(503, "ServiceUnavailable", "away") if request.method == "PUT" and "second" in request.path else None
            )
            await asyncio.sleep(0.5)
            server.fault = lambda _: None
            await asyncio.sleep(1.5)
            assert uids(server) == before
