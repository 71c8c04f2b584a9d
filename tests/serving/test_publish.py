"""Publish is done when every replica serves the round's policy, and says which one does not."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from dagger_operator.serving.publish import publish
from dagger_operator.store.policies import pointed
from dagger_operator.store.progress import read_progress
from dagger_operator.store.results import PublishResult, read_result
from dagger_operator.store.stage import Stage, StageFailure

POLICY = "r001-bbbbbbbbbbbb"


class Agent:
    """`GET /policy` of a replica, which serves another version for so many looks."""

    def __init__(self, *, late: int = 0, version: str = POLICY, weights: str = "w", reason: str = "") -> None:
        self.late, self.version, self.weights, self.reason = late, version, weights, reason

    async def policy(self, _: web.Request) -> web.Response:
        self.late -= 1
        state = "Swapping" if self.late >= 0 else "Serving"
        said = {"version": self.version, "digest": "d", "weights": self.weights, "max_model_len": 1, "reason": self.reason}
        return web.json_response(said | {"state": state})


@contextlib.asynccontextmanager
async def serving(*agents: Agent) -> AsyncIterator[str]:
    """Their addresses, as `DAGGER_AGENT_URL` lists them."""
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for agent in agents:
            app = web.Application()
            app.router.add_get("/policy", agent.policy)
            runner = web.AppRunner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        yield ",".join(urls)


async def test_it_waits_for_every_replica(stage: Callable[..., Stage], document: dict[str, Any]) -> None:
    document["spec"]["student"]["serving"]["replicas"] = 2
    async with serving(Agent(), Agent(late=2)) as urls:
        await publish(stage(round=1, policy=POLICY, DAGGER_AGENT_URL=urls))
    result = await read_result(stage().store, 1, PublishResult)
    assert result is not None and (result.policy, result.replicas) == (POLICY, 2)
    pointer = await pointed(stage().store)
    assert pointer is not None and (pointer.policy, pointer.round) == (POLICY, 1)
    progress = (await read_progress(stage().store, 1, "publish"))[0]
    assert (progress.done, progress.total, progress.unit) == (2, 2, "replicas")


async def test_done_once_it_asks_nobody(stage: Callable[..., Stage]) -> None:
    async with serving(Agent()) as urls:
        await publish(stage(round=1, policy=POLICY, DAGGER_AGENT_URL=urls))
    await publish(stage(round=1, policy=POLICY, DAGGER_AGENT_URL=urls))


@pytest.mark.parametrize(
    ("agents", "replicas", "reason", "said"),
    [
        ([Agent(late=10**6, reason="reload failed: no space")], 1, "PolicyNotServed", "Swapping .* \\(reload failed: no space\\)"),
        ([Agent(version="r000-aaaaaaaaaaaa")], 1, "PolicyNotServed", "Serving r000-aaaaaaaaaaaa"),
        ([Agent()], 2, "PolicyNotServed", "1 of 2 replicas can be reached"),
        ([Agent(), Agent(weights="other")], 2, "ReplicasDisagree", "hold different weights"),
    ],
)
async def test_a_replica_that_does_not_get_there_is_named(
    stage: Callable[..., Stage], document: dict[str, Any], agents: list[Agent], replicas: int, reason: str, said: str
) -> None:
    document["spec"]["student"]["serving"] |= {"replicas": replicas, "startupDeadlineSeconds": 10}
    made = stage(round=1, policy=POLICY)
    serving_settings = made.run.spec.student.serving.model_copy(update={"startup_deadline_seconds": 2})
    student = made.run.spec.student.model_copy(update={"serving": serving_settings})
    run = made.run.model_copy(update={"spec": made.run.spec.model_copy(update={"student": student})})
    async with serving(*agents) as urls:
        quick = Stage(run, 1, 0, "w", POLICY, made.scratch, made.store, {"DAGGER_AGENT_URL": urls})
        with pytest.raises(StageFailure, match=said) as failed:
            await publish(quick)
    assert failed.value.reason == reason and not failed.value.permanent
    assert await read_result(made.store, 1, PublishResult) is None


async def test_an_agent_that_cannot_be_reached_is_named(stage: Callable[..., Stage]) -> None:
    from dagger_operator.serving.agents import said, wait_for

    done, found = await wait_for("http://127.0.0.1:9", 1, seconds=0, done=lambda status: status.serves(POLICY))
    assert not done and "http://127.0.0.1:9: Unreachable" in said(found, 1)
