"""Requests: whose they are, once again, too large, wrong."""

import asyncio
import gc
import json
from io import BytesIO

import aiohttp
import pytest

from dagger_operator.policy.gateway import LARGEST_REQUEST
from dagger_operator.policy.request import ChatRequest
from dagger_operator.serving import proxy
from policy.played import STATE, beta, fail


async def test_a_repeated_state_is_answered_from_the_record(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        first = await r.ask(session, STATE)
        assert await r.ask(session, STATE) == first
        recording = await session.finish()
    assert len(recording.turns) == len(student.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_and_comes_back_gets_the_turn_it_asked_for(student, teacher, rig, stream):
    student.delay = 0.5
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        url, headers = f"{session.base_url}/chat/completions", {"Authorization": f"Bearer {session.token}"}
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await r.http.post(
                    url, json={"messages": STATE, "stream": stream}, headers=headers, timeout=aiohttp.ClientTimeout(total=0.05)
                )
        status, answer = await r.ask(session, STATE)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "student at 1")
        recording = await session.finish()
    assert len(recording.turns) == len(student.requests) == 1
    assert student.cancelled == 0


async def test_a_turn_that_nobody_came_back_for_is_in_the_record_once(student, teacher, rig):
    student.delay = 0.2
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        url, headers = f"{session.base_url}/chat/completions", {"Authorization": f"Bearer {session.token}"}
        with pytest.raises(TimeoutError):
            await r.http.post(url, json={"messages": STATE}, headers=headers, timeout=aiohttp.ClientTimeout(total=0.05))
        assert (await r.ask(session, [*STATE, {"role": "user", "content": "on"}]))[0] == 200
        recording = await session.finish()
    assert [turn.action.message["content"] for turn in recording.turns] == ["student at 1", "student at 2"]


async def test_requests_of_one_rollout_are_taken_one_after_the_other(student, teacher, rig):
    student.delay = 0.05
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        bodies = [[*STATE, {"role": "user", "content": str(number)}] for number in range(8)]
        answers = await asyncio.gather(*(r.ask(session, body) for body in bodies))
        recording = await session.finish()
    assert [status for status, _ in answers] == [200] * 8
    assert student.peak == 1
    assert [turn.index for turn in recording.turns] == list(range(8))


async def test_a_rollouts_token_opens_that_rollout_and_no_other(student, teacher, rig):
    async with rig(student, teacher) as r:
        one, two = r.open(rollout_id="00001"), r.open(rollout_id="00002")
        assert one.token != two.token
        for token in (two.token, "", "nonsense", "\xff"):
            headers = {"Authorization": f"Bearer {token}"}
            async with r.http.post(f"{one.base_url}/chat/completions", json={"messages": STATE}, headers=headers) as response:
                assert response.status == 401
            async with r.http.get(f"{one.base_url}/models", headers=headers) as response:
                assert response.status == 401
        await one.finish()
        assert (await r.ask(one, STATE))[0] == 401
        assert (await r.ask(two, STATE))[0] == 200
    assert len(student.requests) + len(teacher.requests) <= 2


@pytest.mark.parametrize(
    ("body", "field"), [({"messages": STATE, "n": 2}, "n"), ({"messages": STATE, "logprobs": True}, "logprobs"), ({}, "messages")]
)
async def test_what_cannot_be_honoured_is_a_400_that_names_the_field_and_costs_no_turn(student, teacher, rig, body, field):
    async with rig(student, teacher) as r:
        session = r.open()
        headers = {"Authorization": f"Bearer {session.token}"}
        async with r.http.post(f"{session.base_url}/chat/completions", json=body, headers=headers) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == field
        async with r.http.post(f"{session.base_url}/chat/completions", data=b"{", headers=headers) as response:
            assert response.status == 400
        assert (await session.finish()).turns == ()
    assert not student.requests + teacher.requests


@pytest.mark.parametrize(
    "body",
    [
        b" " * LARGEST_REQUEST + b"{}",
        # As JSON it would be 230 MB, and take a second in which no other rollout goes on.
        b'{"messages": [{"role": "user", "content": [' + b"[]," * (3 << 20) + b"[]]}]}",
    ],
)
async def test_a_request_that_no_policy_would_take_is_a_413_and_costs_no_turn(student, teacher, rig, body):
    assert LARGEST_REQUEST == proxy.LARGEST_REQUEST
    async with rig(student, teacher) as r:
        session = r.open()
        headers = {"Authorization": f"Bearer {session.token}"}
        async with r.http.post(f"{session.base_url}/chat/completions", data=BytesIO(body), headers=headers) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "request_too_large"
        assert (await r.ask(session, STATE))[0] == 200
        assert len((await session.finish()).turns) == 1


@pytest.mark.parametrize(("status", "behaviour"), [(503, fail(500)), (400, fail(400)), (409, None)])
async def test_what_a_rollout_asks_that_gets_no_more_turns_is_not_even_read(student, teacher, rig, status, behaviour):
    async def endless():
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    student.always = behaviour
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0), max_turns=1)
        for content in ("one", "two"):
            last, _ = await r.ask(session, [*STATE, {"role": "user", "content": content}])
        assert last == status
        url, headers = f"{session.base_url}/chat/completions", {"Authorization": f"Bearer {session.token}"}
        async with asyncio.timeout(10), r.http.post(url, data=endless(), headers=headers) as response:
            assert response.status == status


async def test_a_failed_turns_request_is_not_kept_while_its_rollout_goes_on(student, teacher, rig):
    student.always = fail(400)
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        assert [(await r.ask(session, [{"role": "user", "content": "to be forgotten"}]))[0] for _ in range(2)] == [400, 400]
        # A request that waited for the turn of the one before it is refused with that.
        other = r.open(mixing=beta(0.0), rollout_id="00001")
        student.delay = 0.2
        bodies = [[{"role": "user", "content": f"to be forgotten {number}"}] for number in range(2)]
        assert [status for status, _ in await asyncio.gather(*(r.ask(other, body) for body in bodies))] == [400, 400]
        gc.collect()
        requests = [found for found in gc.get_objects() if type(found) is ChatRequest]  # proxies warn when they are asked for more
        assert not [request for request in requests if request.messages[0]["content"].startswith("to be forgotten")]
        assert [(await each.finish()).policy_error.reason for each in (session, other)] == ["BadRequest", "BadRequest"]


async def test_a_large_request_is_a_turn_like_any_other(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open()
        body = BytesIO(json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode() + b" " * (2 << 20))
        url, headers = f"{session.base_url}/chat/completions", {"Authorization": f"Bearer {session.token}"}
        async with r.http.post(url, data=body, headers=headers) as response:
            assert response.status == 200
        (turn,) = (await session.finish()).turns
    assert turn.messages[0]["content"] == "\ufffd"


async def test_a_rollouts_requests_are_read_one_at_a_time(student, teacher, rig):
    rest = asyncio.Event()

    async def halting():
        yield b'{"messages": [{"role": "user", '
        await rest.wait()
        yield b'"content": "task"}]}'

    async with rig(student, teacher) as r:
        session, other = r.open(), r.open(rollout_id="00001")
        url, headers = f"{session.base_url}/chat/completions", {"Authorization": f"Bearer {session.token}"}
        first = asyncio.create_task(r.http.post(url, data=halting(), headers=headers))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(r.ask(session, [*STATE, {"role": "user", "content": "more"}]))
        assert (await r.ask(other, STATE))[0] == 200
        await asyncio.sleep(0.2)
        assert not second.done(), "a second body was read beside the first"
        rest.set()
        assert ((await first).status, (await second)[0]) == (200, 200)
        turns = (await session.finish()).turns
    assert [len(turn.messages) for turn in turns] == [1, 1] and len(turns) == 2


async def test_what_a_gateway_cannot_do_is_refused_when_the_rollout_is_opened(student, teacher, rig):
    async with rig(student, None) as r:
        with pytest.raises(ValueError, match="exactly where this gateway has a teacher"):
            r.open()
        with pytest.raises(ValueError, match="made for 'r001-0123456789ab'"):
            r.open(mixing=None, student="r002-000000000000")
        r.open(mixing=None)
        with pytest.raises(ValueError, match="open already"):
            r.open(mixing=None)
    async with rig(student, teacher) as r:
        with pytest.raises(ValueError, match="exactly where this gateway has a teacher"):
            r.open(mixing=None)
