"""No round is made with another student than the one it was planned for."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from dagger_operator.rollout.student import await_student
from dagger_operator.store.stage import Stage, StageFailure

VERSION = "r001-abcdefabcdef"


@dataclass
class Agent:
    """A policy agent that says what it is told to say."""

    url: str = ""
    version: str = VERSION
    state: str = "Serving"
    asked: int = 0

    async def policy(self, http: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response({"version": self.version, "state": self.state, "digest": "d"})


@pytest.fixture
async def agents() -> AsyncIterator[tuple[Agent, Agent]]:
    pair, runners = (Agent(), Agent()), []
    for agent in pair:
        app = web.Application()
        app.router.add_get("/policy", agent.policy)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        agent.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        runners.append(runner)
    yield pair
    for runner in runners:
        await runner.cleanup()


def served(ground: Any, *agents: Agent) -> Stage:
    run = ground.run(student={"model": "student", "serving": {"gpus": 0}})
    environ = {**ground.environ(run), "DAGGER_POLICY": VERSION, "DAGGER_AGENT_URL": ",".join(agent.url for agent in agents)}
    return Stage.from_environment(environ)


async def wait(stage: Stage, patience: float) -> None:
    async with aiohttp.ClientSession() as http:
        await await_student(stage, http, patience=patience)


async def test_servers_of_the_right_version_are_not_waited_for(ground: Any, agents: tuple[Agent, Agent]) -> None:
    await asyncio.wait_for(wait(served(ground, *agents), 60), 30)
    assert all(agent.asked == 1 for agent in agents)


async def test_a_swap_under_way_is_waited_for(ground: Any, agents: tuple[Agent, Agent]) -> None:
    agents[1].state = "Swapping"
    waiting = asyncio.create_task(wait(served(ground, *agents), 60))
    while not agents[1].asked:
        await asyncio.sleep(0.02)
    assert not waiting.done()
    agents[1].state = "Serving"
    await asyncio.wait_for(waiting, 30)


@pytest.mark.parametrize("change", [{"version": "r000-000000000000"}, {"state": "Swapping"}, {"url": "http://127.0.0.1:1"}])
async def test_one_replica_that_stays_behind_fails_the_stage_for_now(
    ground: Any, agents: tuple[Agent, Agent], change: dict[str, str]
) -> None:
    behind = agents[1]
    for name, value in change.items():
        setattr(behind, name, value)
    with pytest.raises(StageFailure) as caught:
        await wait(served(ground, *agents), 0)
    assert (caught.value.reason, caught.value.permanent) == ("StudentNotServed", False)
    assert behind.url.removeprefix("http://") in caught.value.message
    assert agents[0].url.removeprefix("http://") not in caught.value.message


async def test_a_student_behind_an_endpoint_has_no_agent_to_ask(ground: Any) -> None:
    run = ground.run()
    await wait(replace(ground.stage(run), environ={}), 0)
