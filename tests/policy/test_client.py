"""A policy that misbehaves: tried again where that may help, and named for what it is where it does not."""

import asyncio
import socket
import time
from collections import Counter
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from yarl import URL

from dagger_operator.api import MaxTokensParameter, Sampling
from dagger_operator.policy import replicas as replicas_module
from dagger_operator.policy.client import Client
from dagger_operator.policy.failures import PolicyRefused, PolicyUnavailable
from dagger_operator.policy.metrics import GatewayMetrics
from dagger_operator.policy.replicas import LOOK_UP_SECONDS, Replicas
from dagger_operator.policy.request import ChatRequest
from dagger_operator.policy.retry import Backoff, retry_after_seconds

STATE = ChatRequest(({"role": "user", "content": "hello"},), ({"type": "function", "function": {"name": "bash"}},), {"stop": ["x"]})


async def ask(upstream, *, forward=None, affinity="00000", registry=None):
    async with Client(upstream, GatewayMetrics(registry or CollectorRegistry())) as client:
        return await client.complete(STATE, seed=5, priority=10, affinity=affinity, forward=forward)


def status(code, body='{"error": {"message": "no"}}', **headers):
    async def behave(stub, http, request):
        return web.Response(status=code, text=body, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return behave


def raw(text):
    async def behave(stub, http, request):
        return web.Response(text=text, content_type="application/json")

    return behave


async def hang_up(stub, http, request):
    http.transport.abort()
    return web.Response()


async def another_version(stub, http, request):
    return web.json_response(stub.answer(request | {"model": "r009-ffffffffffff"}))


async def test_a_served_policy_gets_the_specs_sampling_a_seed_and_a_priority(student, upstream):
    answer = await ask(upstream(student.url))
    body = student.requests[0]
    assert body == {
        "model": "r001-0123456789ab",
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"type": "function", "function": {"name": "bash"}}],
        "stop": ["x"],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 5,
        "priority": 10,
    }
    assert student.tokens == ["Bearer student-secret"]
    found = answer.completion
    assert found.message == {"role": "assistant", "content": "student at 1"}
    assert (found.policy, found.finish_reason) == ("r001-0123456789ab", "stop")
    assert (found.prompt_tokens, found.cached_tokens, found.completion_tokens) == (10, 8, 3)


async def test_an_endpoint_gets_its_own_model_name_and_nothing_that_it_may_not_know(student, upstream):
    answer = await ask(upstream(student.url, served=False, model="gpt-x", version="endpoint-0123456789ab"))
    assert student.requests[0]["model"] == "gpt-x"
    assert not {"seed", "priority"} & student.requests[0].keys()
    assert answer.completion.policy == "endpoint-0123456789ab"


@pytest.mark.parametrize(("shape", "sent"), [(1.0, {}), (0.5, {"temperature": 0.5, "top_p": 0.5})])
async def test_a_reasoning_model_is_asked_with_what_it_knows(student, upstream, shape, sent):
    sampling = Sampling(temperature=shape, top_p=shape, max_tokens=64)
    parameter = MaxTokensParameter.MAX_COMPLETION_TOKENS
    await ask(upstream(student.url, served=False, sampling=sampling, max_tokens_parameter=parameter))
    said = {name: student.requests[0].get(name) for name in ("temperature", "top_p", "max_tokens", "max_completion_tokens")}
    assert {name: value for name, value in said.items() if value is not None} == {**sent, "max_completion_tokens": 64}


async def test_an_endpoint_is_told_a_temperature_of_one_which_need_not_be_its_models_default(student, upstream):
    await ask(upstream(student.url, served=False, sampling=Sampling(temperature=1, top_p=1)))
    assert (student.requests[0]["temperature"], student.requests[0]["top_p"]) == (1, 1)


async def test_greedy_is_temperature_zero(student, upstream):
    await ask(upstream(student.url).greedy())
    assert (student.requests[0]["temperature"], student.requests[0]["top_p"], student.requests[0]["max_tokens"]) == (0.0, 1.0, 64)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (status(500), "ServerError"),
        (status(503, Retry_After="0"), "ServerError"),
        (status(429), "RateLimited"),
        (raw("{not json"), "Garbled"),
        (raw('{"choices": []}'), "Garbled"),
        (raw('{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}'), "Garbled"),
        (hang_up, "Unreachable"),
    ],
)
async def test_what_may_pass_is_tried_again_and_counted(student, upstream, behaviour, reason):
    student.script.extend([behaviour, behaviour])
    registry = CollectorRegistry()
    # An endpoint, whose answers need no version: garbled ones are then only that.
    answer = await ask(upstream(student.url, served=False), registry=registry)
    assert answer.completion.message["content"] == "student at 1"
    assert registry.get_sample_value("dagger_gateway_retries_total", {"role": "student", "reason": reason}) == 2
    student.script.extend([behaviour] * 3)
    with pytest.raises(PolicyUnavailable, match="tried 3 times") as caught:
        await ask(upstream(student.url, served=False))
    assert caught.value.reason == reason
    assert not student.script


@pytest.mark.parametrize(
    ("behaviour", "error", "reason"),
    [
        (status(401), PolicyUnavailable, "Unauthorized"),
        (status(403), PolicyUnavailable, "Unauthorized"),
        (status(404), PolicyUnavailable, "WrongVersion"),
        (status(302, Location="https://elsewhere"), PolicyUnavailable, "Redirected"),
        (another_version, PolicyUnavailable, "WrongVersion"),
        (status(400, '{"message": "This model\'s maximum context length is 64 tokens."}'), PolicyRefused, "ContextTooLong"),
        (status(400, '{"error": {"code": "context_length_exceeded"}}'), PolicyRefused, "ContextTooLong"),
        # vLLM 0.32: a prompt that is longer than its context, and one that leaves no token of it.
        (status(400, "The decoder prompt (length 70) is longer than the maximum model length of 64."), PolicyRefused, "ContextTooLong"),
        (status(400, "max_tokens must be at least 1, got 0."), PolicyRefused, "ContextTooLong"),
        (status(400), PolicyRefused, "BadRequest"),
        (status(422), PolicyRefused, "BadRequest"),
        (status(413), PolicyRefused, "ContextTooLong"),
        # What is not about the state is the infrastructure's, and never the end of an agent.
        (status(402), PolicyUnavailable, "PaymentRequired"),
        (status(407), PolicyUnavailable, "TurnedAway"),
        (status(423), PolicyUnavailable, "TurnedAway"),
        (status(451), PolicyUnavailable, "TurnedAway"),
    ],
)
async def test_what_stays_is_not_tried_again(student, upstream, behaviour, error, reason):
    student.script.append(behaviour)
    with pytest.raises(error) as caught:
        await ask(upstream(student.url))
    assert caught.value.reason == reason
    assert len(student.requests) == 1


OVERLOADED = {"code": 502, "message": "the provider is overloaded"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("of_a_choice", [False, True])
@pytest.mark.parametrize("served", [False, True])
async def test_an_error_that_comes_with_http_200_is_tried_again_and_told(student, upstream, served, of_a_choice, streamed):
    async def fails(stub, http, request):
        if of_a_choice:
            told = stub.answer(request)
            told["choices"][0] |= {"finish_reason": "error", "error": OVERLOADED, "delta": {}}
        else:
            told = {"error": OVERLOADED}
        return await stub.stream(http, [told]) if streamed else web.json_response(told)

    forward = (lambda chunk: None) if streamed else None
    student.script.append(fails)
    assert (await ask(upstream(student.url, served=served), forward=forward)).completion.message["content"] == "student at 1"
    student.always = fails
    with pytest.raises(PolicyUnavailable, match=r"the provider is overloaded.*tried 3 times") as caught:
        await ask(upstream(student.url, served=served), forward=forward)
    assert caught.value.reason == "ServerError"


async def test_an_answer_that_names_no_error_is_a_turn(student, upstream):
    async def nothing_wrong(stub, http, request):
        return web.json_response(stub.answer(request) | {"error": None})

    student.script.append(nothing_wrong)
    assert (await ask(upstream(student.url))).completion.message["content"] == "student at 1"


@pytest.mark.parametrize("text", ["<html>Welcome student-secret", '{"detail": "Welcome student-secret"}'])
async def test_an_answer_that_is_no_turn_is_quoted_without_the_secret(student, upstream, text):
    student.always = raw(text)
    with pytest.raises(PolicyUnavailable, match=r"Welcome \*\*\*") as caught:
        await ask(upstream(student.url, served=False))
    assert caught.value.reason == "Garbled"


async def test_a_policy_that_is_down_is_unreachable(upstream):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(PolicyUnavailable, match=r"student at http://127.0.0.1:\d+: .*tried 3 times") as caught:
            await ask(upstream(url))
    assert caught.value.reason == "Unreachable"


async def test_a_slow_policy_misses_its_deadline(student, upstream):
    student.delay = 30
    with pytest.raises(PolicyUnavailable, match=r"no answer within 0\.3 s") as caught:
        await ask(upstream(student.url, timeout_seconds=0.3, attempts=2))
    assert (caught.value.reason, len(student.requests)) == ("Timeout", 2)


async def test_retry_after_is_waited_for(student, upstream):
    student.script.append(status(429, Retry_After="1"))
    started = time.monotonic()
    await ask(upstream(student.url, backoff=Backoff(0.001, 30.0)))
    assert time.monotonic() - started >= 1.0


async def test_a_retry_after_of_an_hour_is_capped(student, upstream):
    student.script.append(status(429, Retry_After="3600"))
    await asyncio.wait_for(ask(upstream(student.url, backoff=Backoff(0.001, 0.05))), timeout=20)


async def test_a_stream_is_forwarded_whole_and_only_once_a_try_holds(student, upstream):
    async def broken(stub, http, request):
        return await stub.stream(http, [{"error": {"message": "engine died"}}])

    student.script.extend([status(503), broken])
    chunks = []
    answer = await ask(upstream(student.url), forward=chunks.append)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == "student at 1"
    assert answer.completion.message == {"role": "assistant", "content": "student at 1"}
    assert student.requests[-1]["stream_options"] == {"include_usage": True}
    assert answer.completion.completion_tokens == 3


async def test_a_stream_that_breaks_after_its_first_chunk_is_not_begun_again(student, upstream):
    async def half(stub, http, request):
        return await stub.stream(http, stub.chunks(request)[:3])

    student.script.append(half)
    with pytest.raises(PolicyUnavailable) as caught:
        await ask(upstream(student.url), forward=lambda chunk: None)
    assert (caught.value.reason, len(student.requests)) == ("BrokenStream", 1)


async def test_a_stream_of_another_version_is_stopped_before_anything_is_passed_on(student, upstream):
    async def other(stub, http, request):
        return await stub.stream(http, stub.chunks(request | {"model": "r009-ffffffffffff"}))

    student.script.append(other)
    chunks = []
    with pytest.raises(PolicyUnavailable) as caught:
        await ask(upstream(student.url), forward=chunks.append)
    assert (caught.value.reason, chunks) == ("WrongVersion", [])


async def test_an_endpoint_that_cannot_stream_is_streamed_from_its_answer(student, upstream):
    async def whole(stub, http, request):
        return web.json_response(stub.answer(request))

    student.script.append(whole)
    chunks = []
    await ask(upstream(student.url), forward=chunks.append)
    assert chunks[0]["choices"][0]["delta"]["content"] == "student at 1"


async def test_no_message_holds_the_token_even_where_the_server_echoes_it(student, upstream):
    student.script.append(status(401, "wrong key student-secret"))
    with pytest.raises(PolicyUnavailable) as caught:
        await ask(upstream(student.url))
    assert "student-secret" not in str(caught.value)
    assert "student-secret" not in repr(upstream(student.url))


@pytest.mark.parametrize("streamed", [False, True])
async def test_no_message_holds_a_part_of_a_token_that_lies_where_it_is_cut(student, upstream, streamed):
    text = "x" * 480 + " your key student-secret is wrong"

    async def errs(stub, http, request):
        return await stub.stream(http, [{"error": text}])

    student.always = errs if streamed else status(400, text)
    with pytest.raises((PolicyUnavailable, PolicyRefused), match="x your key") as caught:
        await ask(upstream(student.url, attempts=1), forward=(lambda chunk: None) if streamed else None)
    assert "stud" not in str(caught.value).partition("xxx")[2]


async def test_a_rollout_stays_with_one_replica_and_rollouts_spread(policies, upstream):
    stubs = [await policies(f"replica{i}") for i in range(3)]
    urls = [stub.url for stub in stubs]
    async with Client(upstream(*urls), GatewayMetrics(CollectorRegistry())) as client:
        for rollout in range(60):
            answers = [await client.complete(STATE, seed=0, priority=0, affinity=f"{rollout:05}") for _ in range(2)]
            assert len({answer.completion.message["content"] for answer in answers}) == 1
    assert all(len(stub.requests) >= 2 * 8 for stub in stubs)


async def test_a_replica_that_dies_moves_its_own_rollouts_only(policies, upstream):
    stubs = [await policies(f"replica{i}") for i in range(2)]
    async with AsyncExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        urls = [*(stub.url for stub in stubs), dead]
        before = {f"{i:05}": await Replicas(urls, resolve=False).pick(f"{i:05}") for i in range(40)}
        client = await stack.enter_async_context(Client(upstream(*urls), GatewayMetrics(CollectorRegistry())))
        names = {stub.url: stub.name for stub in stubs}
        for rollout, url in before.items():
            answer = await client.complete(STATE, seed=0, priority=0, affinity=rollout)
            assert url == dead or answer.completion.message["content"] == f"{names[url]} at 1"
    assert Counter(before.values())[dead] > 0


async def test_a_replica_that_restarts_sends_its_rollouts_to_another(policies, upstream):
    stubs = [await policies(f"replica{i}") for i in range(2)]
    stubs[0].always = status(503, Retry_After="0")
    async with Client(upstream(*(stub.url for stub in stubs), attempts=2), GatewayMetrics(CollectorRegistry())) as client:
        for rollout in range(20):
            answer = await client.complete(STATE, seed=0, priority=0, affinity=f"{rollout:05}")
            assert answer.completion.message["content"] == "replica1 at 1"
    assert len(stubs[0].requests) == 1


async def test_a_host_name_stands_for_all_its_addresses_until_one_fails(monkeypatch):
    """The name server is the one thing replaced here: no test machine has a headless Service."""
    answers = [["127.0.0.2", "127.0.0.3"], ["127.0.0.3", "127.0.0.4"]]
    asked = []

    async def getaddrinfo(host, port, **_):
        asked.append((host, port))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[len(asked) - 1]]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    replicas = Replicas(["http://run-student:8000/v1"], resolve=True)
    found = {await replicas.pick(f"{i:05}") for i in range(50)}
    assert found == {"http://127.0.0.2:8000/v1", "http://127.0.0.3:8000/v1"}
    replicas.unreachable("http://127.0.0.2:8000/v1")
    found = {await replicas.pick(f"{i:05}") for i in range(50)}
    assert found == {"http://127.0.0.3:8000/v1", "http://127.0.0.4:8000/v1"}
    assert asked == [("run-student", 8000)] * 2


async def test_a_replica_that_came_back_gets_its_rollouts_again(monkeypatch):
    """The name server and the clock are replaced: a Service does not show a replica while it restarts."""
    one, other = "127.0.0.2", "127.0.0.3"
    answers = [[one, other], [other], OSError("the name server is away"), [one, other]]
    now = 1000.0
    monkeypatch.setattr(replicas_module, "time", SimpleNamespace(monotonic=lambda: now))

    async def getaddrinfo(host, port, **_):
        found = answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    async def placed():
        return {rollout: URL(await replicas.pick(rollout)).host for rollout in (f"{i:05}" for i in range(50))}

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    replicas = Replicas(["http://run-student:8000/v1"], resolve=True)
    before = await placed()
    assert set(before.values()) == {one, other}
    replicas.unreachable(f"http://{one}:8000/v1")
    assert set((await placed()).values()) == {other}
    now += LOOK_UP_SECONDS + 1
    assert set((await placed()).values()) == {other}  # a lookup that fails costs nobody what is known
    now += LOOK_UP_SECONDS + 1
    assert await placed() == before
    assert not answers


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(hours=1), usegmt=True), 0.0),
        ("soon", None),
        ("-3", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header, seconds):
    assert retry_after_seconds(header, NOW) == seconds


@given(st.integers(1, 10_000), st.none() | st.floats(0, 1e6))
def test_waits_grow_are_jittered_and_never_pass_the_cap(failures, retry_after):
    wait = Backoff(0.5, 30.0).wait(failures, retry_after)
    assert min(30.0, retry_after or 0.0) <= wait <= min(30.0, max(0.5 * 2.0 ** min(failures - 1, 30), retry_after or 0.0))
