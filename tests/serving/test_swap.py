"""A replica changes its policy in place, falls back to a restart, and never says one version while another answers."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagger_operator.serving import replica
from dagger_operator.serving.engine import RELOADING, Health
from dagger_operator.store.objects import StoreUnavailable

FIRST, SECOND, THIRD = "r000-aaaaaaaaaaaa", "r001-bbbbbbbbbbbb", "r002-cccccccccccc"
VERSIONS = (FIRST, SECOND, THIRD, "r003-dddddddddddd")

_ENDPOINTS = ("/update_weight_version", "/pause", "/collective_rpc", "/reset_prefix_cache", "/resume", "/weight_checker", "/tokenize")
_faults = st.lists(
    st.tuples(st.sampled_from((*_ENDPOINTS, "/weight_info", "/health", "/v1/chat/completions")), st.sampled_from(("error", "crash")))
    | st.just(("/collective_rpc", "stale")),
    max_size=4,
)


class Client:
    """Asks on and on, as rollouts do, and holds every answer against the weights that made it."""

    def __init__(self, pod: Any) -> None:
        self.pod, self.answers, self.refusals = pod, 0, 0

    async def ask(self, http: aiohttp.ClientSession, version: str) -> int:
        body = {"model": version, "messages": [{"role": "user", "content": "the same question"}]}
        async with http.post(f"{self.pod.url}/v1/chat/completions", json=body) as answer:
            found = await answer.json()
            if answer.status == 200:
                assert found["model"] == version == found["choices"][0]["message"]["content"]
                self.answers += 1
            else:
                self.refusals += 1
            return answer.status

    async def go_on(self) -> None:
        async with aiohttp.ClientSession() as http:
            while True:
                await self.ask(http, self.pod.gate.version or FIRST)
                await asyncio.sleep(0)


async def test_weights_change_in_place_without_a_restart(pod: Any) -> None:
    async with pod.running(), aiohttp.ClientSession() as http:
        client = Client(pod)
        assert await client.ask(http, FIRST) == 200
        pod.target = SECOND
        await pod.replica.step()
        assert (pod.replica.state, pod.gate.version, pod.vllm.starts) == ("Serving", SECOND, 1)
        assert await client.ask(http, SECOND) == 200  # the same question: a prefix cache of the old weights would answer wrongly
        assert await client.ask(http, FIRST) == 404
        assert pod.shared.current == SECOND
        assert not pod.shared.folder(FIRST).exists()


async def test_requests_under_way_are_answered_by_the_version_that_took_them(pod: Any) -> None:
    pod.vllm.turn_seconds = 0.2
    async with pod.running(), aiohttp.ClientSession() as http:
        client = Client(pod)
        under_way = [asyncio.create_task(client.ask(http, FIRST)) for _ in range(20)]
        while pod.gate.inside < 20:
            await asyncio.sleep(0.01)
        pod.target = SECOND
        swap = asyncio.create_task(pod.replica.step())
        while pod.gate.version is not None:
            await asyncio.sleep(0.01)
        refused = await http.post(f"{pod.url}/v1/chat/completions", json={"model": FIRST, "messages": []})
        assert refused.status == 503 and refused.headers["Retry-After"] == "1"
        assert await asyncio.gather(*under_way) == [200] * 20
        await swap
        assert pod.gate.version == SECOND


async def test_a_failed_reload_makes_vllm_restart_on_the_new_weights(pod: Any) -> None:
    async with pod.running():
        pod.target = SECOND
        pod.vllm.faults = [("/collective_rpc", "error")]
        await pod.replica.step()
        assert not await pod.replica.server_well()
        assert not pod.replica.ready and pod.gate.version is None
        assert "restarts" in pod.replica.reason
        await pod.replica.step()  # the old server is still there: nobody may be let in
        assert pod.gate.version is None
        await pod.settle()
        assert (pod.vllm.starts, pod.vllm.weights, pod.gate.version) == (2, SECOND, SECOND)
        assert await pod.replica.server_well()


async def test_a_vllm_that_is_silent_is_taken_for_a_busy_one_and_left_alone_for_some_minutes(
    pod: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent() -> Health:
        return Health.SILENT

    async with pod.running():
        assert await pod.replica.server_well()
        monkeypatch.setattr(pod.replica._engine, "health", silent)
        assert await pod.replica.server_well()
        monkeypatch.setattr(replica, "BUSY_SECONDS", 0.0)
        assert not await pod.replica.server_well()


async def test_a_reload_that_changed_nothing_is_found_out(pod: Any) -> None:
    async with pod.running():
        pod.target = SECOND
        pod.vllm.faults = [("/collective_rpc", "stale")]
        await pod.replica.step()
        assert "still holds the same weights" in pod.replica.reason
        await pod.settle()
        assert pod.vllm.weights == SECOND


async def test_on_the_cpu_an_adapter_is_changed_in_place_although_no_weight_that_shows_changes(pod: Any) -> None:
    pod.vllm.packs = True
    async with pod.running():
        for pod.target in (SECOND, THIRD):
            await pod.replica.step()
            assert (pod.replica.state, pod.gate.version, pod.vllm.weights) == ("Serving", pod.target, pod.target)
        assert pod.vllm.starts == 1


async def test_a_version_that_cannot_be_fetched_leaves_the_old_one_serving(pod: Any) -> None:
    async with pod.running():
        pod.store_error = StoreUnavailable("the bucket is away")
        for _ in range(3):
            await pod.replica.step()
        assert (pod.replica.state, pod.gate.version) == ("Serving", FIRST)
        assert "the bucket is away" in pod.replica.reason
        pod.store_error = None
        await pod.replica.step()
        assert pod.replica.reason == ""


async def test_a_full_disk_leaves_the_old_version_serving(pod: Any) -> None:
    async with pod.running():
        pod.target, pod.disk_full = SECOND, True
        await pod.replica.step()
        assert (pod.replica.state, pod.gate.version) == ("Serving", FIRST)
        assert "No space left" in pod.replica.reason
        pod.disk_full = False
        await pod.settle()


async def test_an_agent_that_restarts_while_storage_is_away_serves_on(pod: Any) -> None:
    async with pod.running():
        pod.store_error = StoreUnavailable("the bucket is away")
        async with pod.agent():
            await pod.replica.step()
            assert (pod.replica.state, pod.gate.version) == ("Serving", FIRST)


async def test_a_server_left_half_changed_by_a_killed_agent_is_changed_anew(pod: Any) -> None:
    async with pod.running():
        pod.vllm.label, pod.vllm.weights = RELOADING, "neither"
        pod.vllm.running.clear()
        pod.target = SECOND
        async with pod.agent():
            await pod.settle()
            assert (pod.vllm.weights, pod.vllm.label, pod.vllm.running.is_set()) == (SECOND, SECOND, True)


async def test_a_crash_is_noticed_and_the_new_server_verified(pod: Any) -> None:
    async with pod.running():
        await pod.vllm.crash()
        await pod.replica.step()
        assert (pod.replica.state, pod.gate.version) == ("Starting", None)
        await pod.settle()
        assert (pod.vllm.starts, pod.gate.version, pod.vllm.label) == (2, FIRST, FIRST)


async def test_a_chat_template_that_renders_otherwise_than_it_tokenizes_is_not_served(pod: Any) -> None:
    pod.vllm.reported_tokens = 9
    async with pod.running():
        assert pod.gate.version is None
        assert "7 tokens of a chat that is answered from 9" in pod.replica.reason


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(plan=st.lists(st.tuples(st.sampled_from(VERSIONS[1:]), _faults, st.none() | st.integers(0, 40)), min_size=1, max_size=3))
def test_whatever_fails_in_whatever_order_the_right_weights_answer_in_the_end(
    make_pod: Callable[[], Any], plan: list[tuple[str, list[tuple[str, str]], int | None]]
) -> None:
    """In each part of the plan the pointer moves, faults lie in wait, and the agent may be killed after so many turns of the event loop."""

    async def play() -> None:
        pod = make_pod()
        async with pod.running(), contextlib.AsyncExitStack() as agents:
            client = Client(pod)
            asking = [asyncio.create_task(client.go_on()) for _ in range(3)]
            for target, faults, killed_after in plan:
                pod.target, pod.vllm.faults = target, list(faults)
                if killed_after is not None:
                    step = asyncio.create_task(pod.replica.step())
                    for _ in range(killed_after):
                        await asyncio.sleep(0)
                    step.cancel()
                    await asyncio.gather(step, return_exceptions=True)
                    await agents.enter_async_context(pod.agent())
                await pod.settle()
                pod.vllm.faults = []
                await pod.settle()
                assert pod.vllm.weights == target
            before = client.answers
            while client.answers < before + 3 and not any(task.done() for task in asking):
                await pod.settle()  # a crash that was under way shows only now
                await asyncio.sleep(0.005)
            await _end(asking)

    asyncio.run(play())


async def _end(asking: list[asyncio.Task[None]]) -> None:
    for task in asking:
        task.cancel()
    for ended in await asyncio.gather(*asking, return_exceptions=True):
        if not isinstance(ended, asyncio.CancelledError | aiohttp.ClientError):
            raise AssertionError from ended
