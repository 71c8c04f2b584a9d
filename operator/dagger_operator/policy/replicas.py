"""Chooses the replica that a rollout uses: always the same one while it lives, so that the rollout's prefix stays cached there."""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Sequence
from hashlib import blake2b

from yarl import URL

DOWN_SECONDS = 30.0
"""How long an unreachable replica is skipped."""
LOOK_UP_SECONDS = 30.0
"""How long resolved addresses are used: a Service shows a restarted replica only once it is ready again."""


class Replicas:
    """The replicas of one policy, ranked for each rollout by rendezvous hashing: when one leaves, only its own rollouts move."""

    def __init__(self, urls: Sequence[str], *, resolve: bool) -> None:
        """With `resolve`, a single URL stands for all addresses of its host name, as with a headless Service."""
        self._urls = tuple(urls)
        self._resolves = resolve and len(self._urls) == 1 and not _is_address(self._urls[0])
        self._known = () if self._resolves else self._urls
        self._look_up_at = 0.0
        self._down: dict[str, float] = {}

    async def pick(self, affinity: str) -> str:
        """Return the base URL for this rollout. Raises `OSError` if the host name does not resolve and no address is known from before."""
        now = time.monotonic()
        if self._resolves and (not self._known or now >= self._look_up_at):
            self._look_up_at = now + LOOK_UP_SECONDS  # set first, so that other rollouts do not wait for a slow name server
            try:
                self._known = await addresses(self._urls[0])
            except OSError:
                if not self._known:
                    raise
        alive = [url for url in self._known if self._down.get(url, 0.0) <= now]
        return max(alive or self._known, key=lambda url: blake2b(f"{affinity}\n{url}".encode(), digest_size=8).digest())

    def unreachable(self, url: str) -> None:
        """Skip a replica for a while, and resolve the addresses again."""
        self._down[url] = time.monotonic() + DOWN_SECONDS
        if self._resolves:
            self._known = ()


def _is_address(url: str) -> bool:
    try:
        ipaddress.ip_address(URL(url).host or "")
        return True
    except ValueError:
        return False


async def addresses(url: str) -> tuple[str, ...]:
    """Return one URL for each address of a URL's host name; raises `OSError` if it has none."""
    parsed = URL(url)
    found = await asyncio.get_running_loop().getaddrinfo(parsed.host, parsed.port, type=socket.SOCK_STREAM)
    return tuple(sorted({str(parsed.with_host(str(info[4][0]))) for info in found}))
