"""Connections to the helper break at random; a command runs once all the same, and its result comes."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from dagger_operator.sandbox.interface import SandboxRequest

pytestmark = pytest.mark.heavy


@asynccontextmanager
async def breaking_proxy(target: int, chance: random.Random) -> AsyncIterator[int]:
    """A port that leads to the target, and cuts connections, in either direction, after some bytes or some time."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(chance.choice([1, 50, 65536])):
            if chance.random() < 0.15:
                return
            writer.write(data)
            await writer.drain()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        ways: list[asyncio.Task[None]] = []
        try:
            with suppress(OSError):
                there, back = await asyncio.open_connection("127.0.0.1", target)
                ends.append(back)
                ways += [asyncio.create_task(copy(reader, back)), asyncio.create_task(copy(there, writer))]
                await asyncio.wait(ways, timeout=chance.uniform(0.05, 1.0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in ends:
                end.transport.abort()

    carried: set[asyncio.Task[None]] = set()
    server = await asyncio.start_server(lambda reader, writer: carried.add(asyncio.create_task(carry(reader, writer))), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for connection in carried:
            connection.cancel()
        await asyncio.gather(*carried, return_exceptions=True)


async def test_every_command_runs_exactly_once(helper: Any) -> None:
    sandbox = await helper.create(SandboxRequest("severed"), timeout=60)
    async with breaking_proxy(helper.port, random.Random(7)) as port:
        sandbox = helper.rerouted(sandbox, port)
        for number in range(25):
            result = await sandbox.execute(f"echo {number} >> log; sleep 0.{number % 3}; echo done {number}", timeout=60)
            assert (result.output, result.returncode) == (f"done {number}\n", 0)
        assert await sandbox.read("log") == "".join(f"{number}\n" for number in range(25)).encode()
    await sandbox.close()
