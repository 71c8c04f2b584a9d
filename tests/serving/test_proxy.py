"""The proxy lets through turns of the served version and nothing else, and never makes half a turn look like a whole one."""

import asyncio
import itertools
import json
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.serving import proxy

VERSION = "r000-aaaaaaaaaaaa"
MESSAGES = [{"role": "user", "content": 'say "model":"policy"'}]


async def _post(pod: Any, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as http, http.post(f"{pod.url}/v1/chat/completions", data=data, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_another_version_is_an_unknown_model(pod: Any) -> None:
    async with pod.running():
        for model in ("r001-bbbbbbbbbbbb", "policy", None):
            status, answer = await _post(pod, {"model": model, "messages": MESSAGES})
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
            assert VERSION in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        ({"model": VERSION, "messages": MESSAGES, "chat_template": "{{ x }}"}, 400, "unsupported_parameter"),
        ({"model": VERSION, "messages": MESSAGES, "kv_transfer_params": {"remote_host": "elsewhere"}}, 400, "unsupported_parameter"),
    ],
)
async def test_bad_requests_are_refused_by_name(pod: Any, body: Any, status: int, code: str) -> None:
    async with pod.running():
        found, answer = await _post(pod, body)
        assert (found, answer["error"]["code"]) == (status, code)
        assert pod.vllm.calls["/v1/chat/completions"] == 1  # the agent's own, when it verified


async def test_a_request_that_is_too_large_is_refused(pod: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "LARGEST_REQUEST", 1000)
    async with pod.running():
        status, answer = await _post(pod, {"model": VERSION, "messages": MESSAGES * 100})
        assert (status, answer["error"]["code"]) == (413, "request_too_large")


async def test_credentials_do_not_reach_vllm(pod: Any) -> None:
    async with pod.running():
        assert (await _post(pod, {"model": VERSION, "messages": MESSAGES}, Authorization="Bearer secret", **{"X-Request-Id": "7"}))[
            0
        ] == 200
        assert "Authorization" not in pod.vllm.headers[-1]
        assert pod.vllm.headers[-1]["X-Request-Id"] == "7"


async def test_nothing_else_of_vllm_can_be_reached(pod: Any) -> None:
    async with pod.running(), aiohttp.ClientSession() as http:
        for path in ("/collective_rpc", "/pause", "/tokenize", "/weight_info", "/v1/completions", "/v1/chat/completions/../../pause"):
            assert (await http.post(f"{pod.url}{path}", json={})).status in (404, 405)
        listed = await (await http.get(f"{pod.url}/v1/models")).json()
        assert listed["data"] == [{"id": VERSION, "object": "model", "owned_by": "dagger-operator", "max_model_len": 2048}]
        assert "vllm:num_requests_running" in await (await http.get(f"{pod.url}/metrics")).text()


async def test_streams_carry_the_version_in_every_chunk(pod: Any) -> None:
    async with pod.running(), aiohttp.ClientSession() as http:
        body = {"model": VERSION, "messages": MESSAGES, "stream": True}
        async with http.post(f"{pod.url}/v1/chat/completions", json=body) as answer:
            assert answer.content_type == "text/event-stream"
            events = [line[6:] for line in (await answer.text()).splitlines() if line]
        assert events[-1] == "[DONE]"
        assert {json.loads(event)["model"] for event in events[:-1]} == {VERSION}


async def test_a_stream_that_breaks_off_breaks_off_for_the_client_too(pod: Any) -> None:
    pod.vllm.turn_seconds = 0.3
    async with pod.running(), aiohttp.ClientSession() as http:
        body = {"model": VERSION, "messages": MESSAGES, "stream": True}
        with pytest.raises(aiohttp.ClientError):
            async with http.post(f"{pod.url}/v1/chat/completions", json=body) as answer:
                await answer.content.readany()
                await pod.vllm.crash()
                await answer.read()


async def test_a_turn_that_vllm_aborted_is_no_answer(pod: Any) -> None:
    pod.vllm.finish_reason = "abort"
    async with pod.running():
        status, answer = await _post(pod, {"model": VERSION, "messages": MESSAGES})
        assert (status, answer["error"]["code"]) == (503, "server_unavailable")


async def test_a_server_that_goes_away_is_said_to_come_back(pod: Any) -> None:
    async with pod.running():
        await pod.vllm.crash()
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"{pod.url}/v1/chat/completions", json={"model": VERSION, "messages": MESSAGES})
            assert answer.status == 503 and answer.headers["Retry-After"] == "1"
            assert (await http.get(f"{pod.url}/health/ready")).status == 200  # not noticed yet
            await pod.replica.step()
            assert (await http.get(f"{pod.url}/health/ready")).status == 503
            assert (await http.get(f"{pod.url}/health/server")).status == 503
            said = await (await http.get(f"{pod.url}/policy")).json()
            assert (said["state"], said["version"], said["reason"]) == ("Starting", VERSION, "vLLM does not listen yet")


async def test_a_client_that_hangs_up_ends_its_request(pod: Any) -> None:
    async with pod.running(), aiohttp.ClientSession() as http:
        pod.vllm.turn_seconds = 60.0
        asking = asyncio.create_task(http.post(f"{pod.url}/v1/chat/completions", json={"model": VERSION, "messages": MESSAGES}))
        while pod.gate.inside == 0:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(20):
            await pod.gate.drained()


@given(content=st.text(max_size=60), cuts=st.lists(st.integers(0, 400), max_size=6), events=st.integers(1, 3))
def test_renaming_touches_nothing_but_the_name(content: str, cuts: list[int], events: int) -> None:
    """However a stream is cut, and whatever a turn says."""
    event = {"id": "1", "model": "policy", "choices": [{"delta": {"content": content + '"model":"policy"'}}]}
    stream = b"".join(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n" for _ in range(events))
    marks = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    passing = proxy.Events(VERSION)
    out = b"".join(passing.feed(stream[start:end]) for start, end in itertools.pairwise(marks))
    assert len(out.splitlines()) == 2 * events and not passing.ended and not passing.aborted
    for line in out.decode().splitlines():
        if line:
            assert json.loads(line.removeprefix("data: ")) == event | {"model": VERSION}
