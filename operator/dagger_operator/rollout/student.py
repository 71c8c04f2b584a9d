"""Before a worker starts: does every server of the student serve the version that this round is to be made with?"""

import asyncio
import time

import aiohttp
from yarl import URL

from dagger_operator.policy.replicas import addresses
from dagger_operator.store.stage import Stage, StageFailure

POLL_SECONDS = 1.0


async def await_student(stage: Stage, http: aiohttp.ClientSession, *, patience: float) -> None:
    """Waits until every policy agent says that it serves `stage.policy`; a student behind an endpoint has none.

    Raises `StageFailure` (not permanent) where that is not so after `patience` seconds.
    """
    if stage.run.spec.student.endpoint is not None:
        return
    agents = [url.strip().rstrip("/") for url in stage.environ.get("DAGGER_AGENT_URL", "").split(",") if url.strip()]
    if not agents:
        raise StageFailure("IncompleteEnvironment", "DAGGER_AGENT_URL is not set: stages are started by `daggerctl run` or the operator")
    deadline = time.monotonic() + patience
    while wrong := await _wrong(http, agents, stage.policy):
        if time.monotonic() >= deadline:
            raise StageFailure(
                "StudentNotServed",
                f"policy {stage.policy} is not served after {patience:g} s: {'; '.join(wrong)}. "
                "Look at the student's servers; the stage goes on when they serve it",
                permanent=False,
            )
        await asyncio.sleep(POLL_SECONDS)


async def _wrong(http: aiohttp.ClientSession, agents: list[str], version: str) -> list[str]:
    """What each agent that does not serve the version says instead."""
    try:
        urls = [each for url in agents for each in await addresses(url)]
    except OSError as error:
        return [f"{', '.join(agents)}: {error}"]
    found = await asyncio.gather(*(_ask(http, url) for url in urls))
    return [f"{URL(url).authority}: {said}" for url, said in zip(urls, found, strict=True) if said != f"{version} Serving"]


async def _ask(http: aiohttp.ClientSession, url: str) -> str:
    try:
        async with http.get(f"{url}/policy", timeout=aiohttp.ClientTimeout(total=10)) as response:
            if response.status != 200:
                return f"HTTP {response.status}"
            answer = await response.json()
            return f"{answer['version']} {answer['state']}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
