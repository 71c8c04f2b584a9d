"""HTTP probes of a container: startup, readiness, liveness, with the same meaning as in a kubelet."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

FASTEST = 0.5
"""Longest interval between two tries, in seconds: processes on this machine become ready faster than a kubelet's whole seconds."""


@dataclass(frozen=True)
class Probe:
    """An `httpGet` probe; `patience` is how many seconds of consecutive failure it tolerates."""

    url: str
    period: float
    timeout: float
    patience: float

    @classmethod
    def of(cls, spec: Mapping[str, Any] | None, address: str) -> Self | None:
        """Create it from a manifest's probe; None if there is none."""
        if spec is None:
            return None
        target = spec["httpGet"]
        period, threshold = float(spec.get("periodSeconds", 10)), int(spec.get("failureThreshold", 3))
        return cls(
            url=f"http://{address}:{target['port']}{target.get('path', '/')}",
            period=min(period, FASTEST),
            timeout=float(spec.get("timeoutSeconds", 1)),
            patience=period * threshold,
        )

    async def succeeds(self, client: aiohttp.ClientSession) -> bool:
        try:
            async with client.get(self.url, timeout=aiohttp.ClientTimeout(total=max(self.timeout, 1.0))) as answer:
                return answer.status < 400
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def until_success(self, client: aiohttp.ClientSession) -> bool:
        """Retry until it succeeds; return False if `patience` runs out first."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.patience
        while not await self.succeeds(client):
            if loop.time() > deadline:
                return False
            await asyncio.sleep(self.period)
        return True

    async def until_failure(self, client: aiohttp.ClientSession) -> None:
        """Return once it has failed for as long as its `patience`."""
        loop = asyncio.get_running_loop()
        last_success = loop.time()
        while loop.time() - last_success < self.patience:
            await asyncio.sleep(self.period)
            if await self.succeeds(client):
                last_success = loop.time()
