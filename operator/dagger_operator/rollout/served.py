"""Checks that the run's own policies are served in the versions that this round needs, before a worker starts and after each try that
infrastructure broke: until they are, another try would be wasted."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import structlog
from yarl import URL

from dagger_operator.api import DAggerRun, Role
from dagger_operator.policy.replicas import addresses
from dagger_operator.policy.upstream import Upstream
from dagger_operator.store.stage import StageFailure

POLL_SECONDS = 1.0
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Served:
    """One policy that the run serves, as its policy agents report it."""

    role: Role
    version: str
    agents: tuple[str, ...]
    """Base URLs without `/v1`; a host name may stand for several addresses."""
    patience: float
    """Seconds after which a server that does not serve counts as failed."""


def served(run: DAggerRun, *upstreams: Upstream | None) -> tuple[Served, ...]:
    """Return the policies that the run serves itself; a policy behind an endpoint has no agent to ask."""
    settings = {Role.STUDENT: run.spec.student.served, Role.TEACHER: run.spec.teacher.serving}
    return tuple(
        Served(
            role=upstream.role,
            version=upstream.version,
            agents=tuple(url.removesuffix("/v1") for url in upstream.urls),
            patience=serving.startup_deadline_seconds,
        )
        for upstream in upstreams
        if upstream is not None and (serving := settings[upstream.role]) is not None
    )


class Recovery:
    """Where a worker's rollouts wait for its policies: one checks, the others wait for it."""

    def __init__(self, http: aiohttp.ClientSession, policies: Sequence[Served]) -> None:
        self._http, self._policies = http, policies
        self._looking = asyncio.Lock()

    async def __call__(self) -> None:
        """Wait until every reachable policy agent reports that it serves its version; return at once if they all do.

        Raises `StageFailure` (not permanent) if that is still not so when `patience` runs out.
        """
        async with self._looking:
            for policy in self._policies:
                await self._await(policy)

    async def _await(self, policy: Served) -> None:
        deadline, told = time.monotonic() + policy.patience, False
        while wrong := await _wrong(self._http, policy):
            if not told:
                log.warning("waiting for a policy", role=policy.role, policy=policy.version, problem="; ".join(wrong))
                told = True
            if time.monotonic() >= deadline:
                raise StageFailure(
                    f"{policy.role.capitalize()}NotServed",
                    f"policy {policy.version} is not served after {policy.patience:g} s: {'; '.join(wrong)}. "
                    f"Look at the {policy.role}'s servers; the stage continues when they serve it",
                    permanent=False,
                )
            await asyncio.sleep(POLL_SECONDS)


async def _wrong(http: aiohttp.ClientSession, policy: Served) -> list[str]:
    """Return what each agent that does not serve the version reports instead. A Service omits a replica that is starting: rollouts need
    not wait for it while others serve."""
    try:
        urls = [each for url in policy.agents for each in await addresses(url)]
    except OSError as error:
        return [f"{', '.join(policy.agents)}: {error}"]
    found = await asyncio.gather(*(_ask(http, url) for url in urls))
    return [f"{URL(url).authority}: {said}" for url, said in zip(urls, found, strict=True) if said != f"{policy.version} Serving"]


async def _ask(http: aiohttp.ClientSession, url: str) -> str:
    try:
        async with http.get(f"{url}/policy", timeout=aiohttp.ClientTimeout(total=10)) as response:
            if response.status != 200:
                return f"HTTP {response.status}"
            answer = await response.json()
            return f"{answer['version']} {answer['state']}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
