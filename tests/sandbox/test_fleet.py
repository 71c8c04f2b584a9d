"""The pods that count against a worker's most: those that exist, whoever ends them and in whatever order it is told, but for those
whose node does not say that they ended."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web

from dagger_operator.sandbox import pod_fleet
from dagger_operator.sandbox.kube import Kind, Kube
from dagger_operator.sandbox.pod_fleet import PodFleet
from fixtures.api_server import ApiServer, refusal

OWNER = [{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": "worker", "uid": "lease"}]


def pod(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {"worker": "this"}, "ownerReferences": OWNER}}


@asynccontextmanager
async def following(kube: Kube) -> AsyncIterator[PodFleet]:
    fleet = PodFleet(kube, "worker=this", lambda: "lease")
    works = [asyncio.create_task(work) for work in (fleet.follow(), fleet.sweep())]
    try:
        yield fleet
    finally:
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_fleet, "_SWEEP_SECONDS", 0.05)


async def room_for_one(fleet: PodFleet) -> bool:
    try:
        await asyncio.wait_for(fleet.admit("next", 1), 1)
    except TimeoutError:
        return False
    await fleet.dismiss("next")
    return True


async def test_a_pod_deleted_from_outside_makes_room_once_its_rollout_has_ended() -> None:
    async with ApiServer.running() as (server, kube), following(kube) as fleet:
        life = fleet.born(await kube.create(Kind.PODS, pod("victim")))
        await until(lambda: life.uid in fleet._known)
        await server.remove("pods", "victim")
        assert (await asyncio.wait_for(life.lost, 10)).reason == "PodDeleted"
        assert not await room_for_one(fleet), "its rollout has not ended yet"
        await fleet.end(life)
        assert await room_for_one(fleet)
        await asyncio.sleep(0.2)
        assert server.requests.count(("DELETE", "/api/v1/namespaces/sandboxes/pods/victim")) == 1


async def test_a_pod_whose_end_was_told_before_its_birth_makes_room_too() -> None:
    async with ApiServer.running() as (server, kube), following(kube) as fleet:
        made = await kube.create(Kind.PODS, pod("quick"))
        await until(lambda: made["metadata"]["uid"] in fleet._known)
        await server.remove("pods", "quick")
        await until(lambda: made["metadata"]["uid"] not in fleet._known)
        await fleet.end(fleet.born(made))
        assert await room_for_one(fleet)


async def test_a_pod_counts_until_it_is_gone_and_is_deleted_until_then() -> None:
    async with ApiServer.running() as (server, kube), following(kube) as fleet:
        life = fleet.born(await kube.create(Kind.PODS, pod("stubborn")))
        server.fault = lambda request: refusal(503, "ServiceUnavailable", "away") if request.method == "DELETE" else None
        await fleet.end(life)
        assert not await room_for_one(fleet)
        server.fault = lambda request: None
        assert await room_for_one(fleet) and not server.there("pods")


async def deleted_on_a_node_that_is_away(server: ApiServer, name: str, ago: timedelta) -> None:
    """It was to be gone so long ago, and nobody says that it is."""
    (one,) = (one for one in server.there("pods") if one["metadata"]["name"] == name)
    due = (datetime.now(UTC) - ago).strftime("%Y-%m-%dT%H:%M:%SZ")
    server.fault = lambda request: web.json_response({}) if request.method == "DELETE" else None
    await server.change("pods", name, metadata={**one["metadata"], "deletionTimestamp": due}, spec={"nodeName": "node-7"})


async def test_a_pod_that_ends_counts_until_a_minute_after_it_should_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_fleet, "_LOST_AFTER", timedelta(seconds=4))
    async with ApiServer.running() as (server, kube), following(kube) as fleet:
        life = fleet.born(await kube.create(Kind.PODS, pod("stranded")))
        await until(lambda: life.uid in fleet._known)
        await deleted_on_a_node_that_is_away(server, "stranded", timedelta(seconds=1))
        assert (await asyncio.wait_for(life.lost, 10)).reason == "PodDeleted"
        await fleet.end(life)
        assert not await room_for_one(fleet), "its node may have yet to say it"
        assert fleet.ending_on() == ["node-7"]
        await asyncio.wait_for(fleet.admit("next", 1), 10)
        assert server.there("pods"), "it is still there, and nobody told anything meanwhile"


async def test_a_pod_of_a_rollout_that_goes_on_counts_however_long_it_should_have_been_gone() -> None:
    async with ApiServer.running() as (server, kube), following(kube) as fleet:
        life = fleet.born(await kube.create(Kind.PODS, pod("stranded")))
        await until(lambda: life.uid in fleet._known)
        await deleted_on_a_node_that_is_away(server, "stranded", timedelta(hours=1))
        await asyncio.wait_for(life.lost, 10)
        assert not await room_for_one(fleet)
        await fleet.end(life)
        assert await room_for_one(fleet)
