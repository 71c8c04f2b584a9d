"""What the kubelet is told, and what kopf's requests tell about its watches."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp
import pytest
from aiohttp import web

from dagger_operator.cluster.app import _serving
from dagger_operator.cluster.health import LONGEST_LOOK, LONGEST_SILENCE, LONGEST_STANDSTILL, Health
from dagger_operator.cluster.streams import Streams


@dataclass
class World:
    now: float = 0.0
    standstill: float = 0.0
    look: float = 0.0
    leads: bool = True


@pytest.fixture
async def asked() -> AsyncIterator[Callable[..., "asyncio.Future[None]"]]:
    """Asks an HTTP server that knows every list and watch, as kopf would, through a session with a trace."""
    runner = web.AppRunner(web.Application())

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=403 if "refused" in request.query else 200)

    runner.app.router.add_get("/{path:.*}", answer)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def ask(streams: Streams, path: str, **query: str) -> None:
        async with aiohttp.ClientSession(trace_configs=[streams.trace]) as session, session.get(url + path, params=query) as response:
            await response.read()

    yield ask  # type: ignore[misc]
    await runner.cleanup()


async def test_an_operator_is_ready_once_every_watch_is_open_and_stuck_once_one_is_silent(
    asked: Callable[..., "asyncio.Future[None]"],
) -> None:
    world = World()
    streams = Streams(lambda *_: None, clock=lambda: world.now)
    health = Health(streams, standstill=lambda: world.standstill, look=lambda: world.look, leads=lambda: world.leads)
    streams.expect({"jobs", "pods"}, ["lab"])
    assert health.idle() == "not watching yet: jobs in lab, pods in lab"
    assert health.stuck() is None, "to start slowly is not to be stuck"

    await asked(streams, "/apis/batch/v1/namespaces/lab/jobs", watch="true")
    await asked(streams, "/api/v1/namespaces/other/pods", watch="true")
    await asked(streams, "/api/v1/namespaces/lab/pods", watch="true", refused="yes")
    assert health.idle() == "not watching yet: pods in lab"
    await asked(streams, "/api/v1/namespaces/lab/pods", watch="true")
    assert health.idle() is None

    world.now = LONGEST_SILENCE + 1
    await asked(streams, "/apis/batch/v1/namespaces/lab/jobs", watch="true")
    assert "watch" in (health.stuck() or "")
    await asked(streams, "/api/v1/namespaces/lab/pods", watch="true")
    assert health.stuck() is None


async def test_a_list_that_is_not_read_to_its_end_makes_an_operator_stuck_after_ten_minutes(
    asked: Callable[..., "asyncio.Future[None]"],
) -> None:
    world = World(now=5000.0)
    streams = Streams(lambda *_: None, clock=lambda: world.now)
    health = Health(streams, standstill=lambda: 0.0, look=lambda: 0.0, leads=lambda: True)
    assert health.stuck() is None, "a standby expects nothing, for as long as it waits"
    streams.expect({"jobs", "pods"}, [])
    await asked(streams, "/apis/batch/v1/jobs", watch="true")
    world.now += LONGEST_SILENCE
    await asked(streams, "/apis/batch/v1/jobs", watch="true")
    await asked(streams, "/api/v1/pods", limit="500")
    assert health.stuck() is None, "to start slowly is not to be stuck"
    world.now += 1
    assert "watch" in (health.stuck() or "")
    await asked(streams, "/api/v1/pods", watch="true")
    assert health.stuck() is None


async def test_a_list_that_is_read_anew_is_reported_once_its_watch_begins(asked: Callable[..., "asyncio.Future[None]"]) -> None:
    world, listed = World(now=1.0), []
    streams = Streams(lambda *what: listed.append(what), clock=lambda: world.now)
    streams.expect({"pods"}, [])
    await asked(streams, "/api/v1/pods", limit="500")
    world.now = 2.0
    await asked(streams, "/api/v1/pods", limit="500", **{"continue": "more"})
    assert listed == []
    await asked(streams, "/api/v1/pods", watch="true")
    assert listed == [("pods", None, 1.0)]
    await asked(streams, "/api/v1/pods", watch="true")
    assert len(listed) == 1, "a watch that is only opened anew lost nothing"


def test_a_queue_that_stands_still_is_stuck_and_a_standby_is_ready() -> None:
    world = World(leads=False)
    streams = Streams(lambda *_: None, clock=lambda: world.now)
    streams.expect({"pods"}, [])
    health = Health(streams, standstill=lambda: world.standstill, look=lambda: world.look, leads=lambda: world.leads)
    assert health.idle() is None
    world.standstill = LONGEST_STANDSTILL + 1
    assert "waited" in (health.stuck() or "")


def test_a_look_at_a_run_that_hangs_is_stuck_although_others_are_finished() -> None:
    world = World()
    health = Health(Streams(lambda *_: None), standstill=lambda: 0.0, look=lambda: world.look, leads=lambda: True)
    world.look = LONGEST_LOOK
    assert health.stuck() is None
    world.look = LONGEST_LOOK + 1
    assert "looked at" in (health.stuck() or "")


@pytest.mark.parametrize("here", ["127.0.0.1", "[::1]"])
async def test_the_kubelet_is_answered_where_pods_have_ipv4_and_where_they_have_ipv6(here: str) -> None:
    health = Health(Streams(lambda *_: None), standstill=lambda: 0.0, look=lambda: 0.0, leads=lambda: False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with _serving(port, health.routes()), aiohttp.ClientSession() as session, session.get(f"http://{here}:{port}/livez") as answer:
        assert await answer.text() == "ok (standby)"


async def test_a_blocked_event_loop_is_measured() -> None:
    health = Health(Streams(lambda *_: None), standstill=lambda: 0.0, look=lambda: 0.0, leads=lambda: True)
    watching = asyncio.create_task(health.watch_the_loop(every=0.01))
    await asyncio.sleep(0.05)
    asyncio.get_running_loop().call_soon(lambda: __import__("time").sleep(0.3))
    await asyncio.sleep(0.02)
    async with asyncio.timeout(10):
        while health.lag < 0.1:
            await asyncio.sleep(0)
    watching.cancel()
