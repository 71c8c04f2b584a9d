"""No round is made with other policies than those it was planned for, and none is worn out by a policy that restarts."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from dagger_operator.api import Role, Sampling
from dagger_operator.policy.upstream import Upstream
from dagger_operator.rollout.served import Recovery, Served, served
from dagger_operator.store.stage import StageFailure

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


async def wait(*agents: Agent, patience: float = 60.0, role: Role = Role.STUDENT, waiters: int = 1) -> None:
    async with aiohttp.ClientSession() as http:
        recovered = Recovery(http, [Served(role, VERSION, tuple(agent.url for agent in agents), patience)])
        await asyncio.gather(*(recovered() for _ in range(waiters)))


async def test_servers_of_the_right_version_are_not_waited_for(agents: tuple[Agent, Agent]) -> None:
    await asyncio.wait_for(wait(*agents), 30)
    assert all(agent.asked == 1 for agent in agents)


async def test_a_swap_under_way_is_waited_for(agents: tuple[Agent, Agent]) -> None:
    agents[1].state = "Swapping"
    waiting = asyncio.create_task(wait(*agents))
    while not agents[1].asked:
        await asyncio.sleep(0.02)
    assert not waiting.done()
    agents[1].state = "Serving"
    await asyncio.wait_for(waiting, 30)


@pytest.mark.parametrize("change", [{"version": "r000-000000000000"}, {"state": "Swapping"}, {"url": "http://127.0.0.1:1"}])
async def test_one_replica_that_stays_behind_fails_the_stage_for_now(agents: tuple[Agent, Agent], change: dict[str, str]) -> None:
    behind = agents[1]
    for name, value in change.items():
        setattr(behind, name, value)
    with pytest.raises(StageFailure) as caught:
        await wait(*agents, patience=0.0)
    assert (caught.value.reason, caught.value.permanent) == ("StudentNotServed", False)
    assert behind.url.removeprefix("http://") in caught.value.message
    assert agents[0].url.removeprefix("http://") not in caught.value.message


async def test_a_teacher_that_is_not_served_is_named(agents: tuple[Agent, Agent]) -> None:
    agents[0].state = "Starting"
    with pytest.raises(StageFailure, match=r"TeacherNotServed.*the teacher's servers"):
        await wait(*agents, patience=0.0, role=Role.TEACHER)


async def test_of_many_rollouts_that_wait_one_looks(agents: tuple[Agent, Agent]) -> None:
    agents[0].state = "Starting"
    waiting = asyncio.create_task(wait(*agents, waiters=512))
    await asyncio.sleep(1.5)
    assert 1 <= agents[0].asked <= 2 and not waiting.done()
    agents[0].state = "Serving"
    await asyncio.wait_for(waiting, 60)


def test_a_policy_behind_an_endpoint_has_no_agent_to_ask(ground: Any) -> None:
    def upstream(role: Role) -> Upstream:
        return Upstream(role, ("http://10.0.0.1:8000/v1",), None, "m", VERSION, Sampling(), 60.0, 1, served=True)

    both = (upstream(Role.STUDENT), upstream(Role.TEACHER))
    serving = {"gpus": 0, "startupDeadlineSeconds": 77}
    here = ground.run(teacher={"model": "teacher", "serving": serving})
    assert served(ground.run(), *both) == ()
    assert served(here, *both) == (Served(Role.TEACHER, VERSION, ("http://10.0.0.1:8000",), 77),)
    assert served(here, both[0], None) == ()
