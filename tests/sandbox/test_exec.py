"""The way through `exec` where it breaks: whatever comes instead of an answer means that the request is made again."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import WSMsgType, web

from dagger_operator.kube import api
from dagger_operator.sandbox.helper_line import Exec, HelperLine, Routes, Severed
from fixtures.api_server import client_of

Program = Callable[[web.WebSocketResponse], Awaitable[object]]


@asynccontextmanager
async def programs(*started: Program) -> AsyncIterator[Exec]:
    """A way to a pod in which the first `exec` starts the first of them, and so on."""
    left = list(started)

    async def answer(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=["v5.channel.k8s.io"], autoping=False)
        await socket.prepare(request)
        await left.pop(0)(socket)
        return socket

    app = web.Application()
    app.router.add_get("/api/v1/namespaces/sandboxes/pods/pod/exec", answer)
    async with client_of(app) as kube:
        way = Exec(kube, "pod", "token")
        yield way
        await way.close()


async def helper(socket: web.WebSocketResponse) -> None:
    """Answers every request, in parts."""
    async for message in socket:
        if message.type is WSMsgType.BINARY:
            line = json.dumps({"status": 200, "body": "aGVyZQ=="}).encode() + b"\n"
            await socket.send_bytes(b"\1" + line[:9])
            await socket.send_bytes(b"\1" + line[9:])


async def silent(socket: web.WebSocketResponse) -> None:
    """Its node is gone: not even pings are answered."""
    await asyncio.sleep(30)


def printing(text: bytes) -> Program:
    return lambda socket: socket.send_bytes(b"\1" + text)


BROKEN: list[Any] = [
    pytest.param(silent, id="no pong"),
    pytest.param(lambda socket: socket.send_str("not a channel"), id="text"),
    pytest.param(lambda socket: socket.send_bytes(b"\2no such program"), id="ended"),
    pytest.param(printing(b"panic: runtime error\n"), id="no JSON"),
    pytest.param(printing(b'{"status": 200, "body": "a"}\n'), id="no base64"),
    pytest.param(printing(b"[200]\n"), id="no answer"),
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_HEARTBEAT_SECONDS", 0.3)


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_no_answer_severs_the_way_and_the_next_request_starts_anew(broken: Program) -> None:
    async with programs(broken, helper) as way:
        with pytest.raises(Severed):
            await way.ask("PUT", "/commands/1", b"{}", timeout=20)
        assert await way.ask("PUT", "/commands/1", b"{}", timeout=20) == (200, b"here")
        assert await way.ask("GET", "/commands/1", b"", timeout=20) == (200, b"here"), "by the same program"


async def test_a_command_survives_a_node_that_falls_silent() -> None:
    async with programs(silent, helper) as way:
        routes = Routes()
        routes.found_closed("the test says so")
        assert await HelperLine("one", way, way, routes).ask("PUT", "/commands/1", b"{}", timeout=20) == (200, b"here")
