"""The only way out of a sandbox without network: a listening socket inside it, whose connections are forwarded to one address.

A tiny program inside opens the socket on 127.0.0.1, passes it out through a descriptor that it was started with, and execs the
command. A socket stays in the network namespace where it was created, so this process can accept there and connect here.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from dagger_operator.sandbox.interface import SandboxError

_INSIDE = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[2])), backlog=128)
with socket.socket(fileno=int(sys.argv[1])) as door:
    socket.send_fds(door, [b"."], [listener.fileno()])
    door.recv(1)
listener.close()
os.execvp(sys.argv[3], sys.argv[3:])
"""


def parse(address: str) -> tuple[str, int]:
    """Parse `host:port`; raises `SandboxError` if it is malformed."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SandboxError("InvalidAddress", f"network_to {address!r}: write host:port, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)


class Door:
    """What a command is started with to open its way out."""

    def __init__(self, fd: int, port: int) -> None:
        self.fd = fd
        """To be inherited by the command."""
        self._port = port

    def wrap(self, argv: Sequence[str | bytes]) -> list[str | bytes]:
        """Return the command, started by the program that opens the socket."""
        return ["python3", "-I", "-S", "-c", _INSIDE, str(self.fd), str(self._port), *argv]


@asynccontextmanager
async def door(target: str) -> AsyncIterator[Door]:
    """Open a way to `target` (host:port) for one command; it and all its connections are closed at the end."""
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(_serve_handed(ours, target))
    try:
        yield Door(theirs.fileno(), parse(target)[1])
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        ours.close()
        theirs.close()


async def _serve_handed(ours: socket.socket, target: str) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(ours, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(ours)
    _, fds, *_ = socket.recv_fds(ours, 1, 1)
    if not fds:
        return  # the command could not even be started: its exit code reports that
    listener = socket.socket(fileno=fds[0])
    listener.setblocking(False)
    async with serve(listener, target):
        ours.send(b".")
        await asyncio.Event().wait()


@asynccontextmanager
async def serve(listener: socket.socket, target: str) -> AsyncIterator[None]:
    """Forward every connection to `listener` to `target` until the block ends; then cut all of them."""
    host, port = parse(target)
    connections: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await _carry(reader, writer, host, port)
        except asyncio.CancelledError:
            pass  # the command has ended
        finally:
            connections.discard(task)
            writer.close()

    server = await asyncio.start_server(carry, sock=listener)
    try:
        yield
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
    with suppress(OSError):
        upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
        try:
            await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream_reader, writer))
        finally:
            upstream_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def listen_on_host(port: int) -> socket.socket:
    """Listen on the same address on the machine itself, for sandboxes without namespaces. Raises `SandboxError` if it is taken."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise SandboxError(
            "PortTaken", f"127.0.0.1:{port} is needed as the way to the policy gateway: {os.strerror(error.errno or 0)}"
        ) from error
