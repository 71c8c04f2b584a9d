"""Who may write, and until when: a write that would come after another replica may lead is not sent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from dagger_operator.cluster.client import Client
from dagger_operator.cluster.leader import Leader, LeadershipLost
from dagger_operator.kube.api import Api
from dagger_operator.kube.errors import Conflict, Unavailable
from fixtures.objects import Objects

Json = dict[str, Any]


class Leases(Objects):
    async def replace(self, manifest: Json) -> Json:
        self.fault("replace", ("Lease", "lab", "one"))
        return self.put(manifest)


def connect() -> Any:
    raise AssertionError("it is not kept here")


async def test_a_leader_may_write_for_as_long_as_nobody_else_may_lead() -> None:
    now = 100.0
    leases: Any = Leases()
    one = Leader(leases, connect, "lab", "one", "me", clock=lambda: now)
    with pytest.raises(LeadershipLost):
        one.fence()
    await one.acquire()
    assert one.fence() == one.deadline < one.duration
    now += 4.0
    assert one.fence() == one.deadline - 4.0
    now += 6.0
    with pytest.raises(LeadershipLost):
        one.fence()
    await one.release()
    assert leases.there["Lease", "lab", "one"]["spec"]["holderIdentity"] == "me", "it may be another's by now: it is left alone"


async def test_one_that_stops_looks_whether_it_was_given_the_lease_and_gives_it_back() -> None:
    leases: Any = Leases()
    one = Leader(leases, connect, "lab", "one", "me")
    await Leader(leases, connect, "lab", "one", "me").acquire()  # what it wrote, and was cancelled before it heard of it
    await one.release()
    assert leases.there["Lease", "lab", "one"]["spec"]["holderIdentity"] == ""
    await Leader(leases, connect, "lab", "one", "another").acquire()
    await one.release()
    assert leases.there["Lease", "lab", "one"]["spec"]["holderIdentity"] == "another"


async def test_an_api_server_that_does_not_answer_keeps_nobody_from_stopping() -> None:
    class Silent:
        async def get(self, *_: str) -> Json:
            await asyncio.sleep(600)
            raise Conflict("never", 409, "", "")

    one = Leader(cast("Client", Silent()), connect, "lab", "one", "me", deadline=0.2)
    async with asyncio.timeout(5):
        await one.release()


class Server:
    def __init__(self) -> None:
        self.wrote, self.going_on = list[str](), asyncio.Event()
        self.reading = asyncio.Event()

    @asynccontextmanager
    async def client(self, within: float) -> AsyncIterator[Client]:
        """A client with one connection, whose process may write for so many seconds."""
        app = web.Application()
        app.router.add_get("/api/v1", self._served)
        app.router.add_get("/{path:.*}", self._read)
        app.router.add_route("*", "/{path:.*}", self._write)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
                settings = Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
                yield Client(Api(settings, http)).fenced(lambda: within)
        finally:
            await runner.cleanup()

    async def _served(self, _: web.Request) -> web.Response:
        return web.json_response({"resources": [{"kind": "Pod", "name": "pods"}]})

    async def _read(self, _: web.Request) -> web.Response:
        self.reading.set()
        await self.going_on.wait()
        return web.json_response({})

    async def _write(self, request: web.Request) -> web.Response:
        self.wrote.append(request.method)
        await asyncio.sleep(0.5)
        return web.json_response({"kind": "Pod"})


POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "lab"}}


async def test_a_write_that_gets_no_connection_in_time_is_never_sent() -> None:
    server = Server()
    async with server.client(within=0.1) as client:
        await client.served("v1")
        holding = asyncio.create_task(client.get("v1", "Pod", "lab", "a"))
        await server.reading.wait()
        for write in (client.create(POD), client.apply(POD), client.patch(POD), client.replace(POD)):
            async with asyncio.timeout(5):
                with pytest.raises(Unavailable):
                    await write
        async with asyncio.timeout(5):
            with pytest.raises(Unavailable):
                await client.delete("v1", "Pod", "lab", "a", preconditions={})
        server.going_on.set()
        await holding
        await asyncio.sleep(0.1)
    assert server.wrote == []


async def test_a_write_that_was_sent_may_take_longer_as_with_a_webhook_that_is_slow() -> None:
    server = Server()
    async with server.client(within=0.1) as client:
        assert await client.create(POD) == {"kind": "Pod"}
    assert server.wrote == ["POST"]
