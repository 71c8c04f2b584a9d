"""The agents of a server's replicas, as seen by a stage from outside."""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
from yarl import URL

from dagger_operator.store.progress import Tell, silent

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class AgentStatus:
    """Answer of one agent to `GET /policy`."""

    url: str
    """Base URL, without `/v1`."""
    version: str | None = None
    state: str = "Unreachable"
    weights: str = ""
    max_model_len: int = 0
    reason: str = ""

    def serves(self, version: str) -> bool:
        return self.state == "Serving" and self.version == version

    def __str__(self) -> str:
        return f"{self.url}: {self.state} {self.version or ''}".rstrip() + (f" ({self.reason})" if self.reason else "")


async def addresses(urls: str) -> tuple[str, ...]:
    """Return every replica's base URL: from a comma-separated list, or by looking up the one host name that stands for all of them."""
    given = tuple(url.strip().rstrip("/") for url in urls.split(",") if url.strip())
    if len(given) != 1 or _is_address(URL(given[0])):
        return given
    parsed = URL(given[0])
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parsed.host, parsed.port, type=socket.SOCK_STREAM)
    except OSError:
        return ()  # a headless Service has no address until a replica is ready
    return tuple(sorted({str(parsed.with_host(str(info[4][0]))) for info in found}))


async def wait_for(
    urls: str,
    replicas: int,
    *,
    seconds: float,
    done: Callable[[AgentStatus], bool],
    tell: Tell = silent,
    look_seconds: float = _LOOK_SECONDS,
) -> tuple[bool, tuple[AgentStatus, ...]]:
    """Poll until `replicas` replicas are all `done`, or until the timeout. Return whether they are, and their last statuses. `tell` is
    called with the number that are done."""
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS)) as session:
        while True:
            found = tuple(await asyncio.gather(*(_look(session, url) for url in await addresses(urls))))
            await tell(min(replicas, sum(map(done, found))), replicas)
            if len(found) >= replicas and all(map(done, found)):
                return True, found
            if time.monotonic() >= deadline:
                return False, found
            await asyncio.sleep(look_seconds)


def said(found: Sequence[AgentStatus], replicas: int) -> str:
    """Format for messages: how many replicas answer, and the status of each."""
    return f"{len(found)} of {replicas} replicas can be reached" + "".join(f"; {status}" for status in found)


async def _look(session: aiohttp.ClientSession, url: str) -> AgentStatus:
    try:
        async with session.get(f"{url}/policy") as answer:
            answer.raise_for_status()
            found = await answer.json()
        known = {key: found[key] for key in ("version", "state", "weights", "max_model_len", "reason")}
        return AgentStatus(url=url, **known)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
        return AgentStatus(url=url, reason=f"{type(error).__name__}: {error}")


def _is_address(url: URL) -> bool:
    try:
        ipaddress.ip_address(url.host or "")
    except ValueError:
        return False
    return True
