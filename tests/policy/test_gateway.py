"""What the gateway promises a scaffold and the record, whatever the scaffold, the network and the policies do."""

import asyncio
import gc
import json
import time
from io import BytesIO

import aiohttp
import pytest
from aiohttp import web

from dagger_operator.api import LabelMode, Mixing, Schedule, ScheduleType
from dagger_operator.policy.coins import coin
from dagger_operator.policy.gateway import LARGEST_REQUEST
from dagger_operator.policy.request import ChatRequest
from dagger_operator.serving import proxy
from dagger_operator.store.records import Actor, LabelFlaw, Outcome, Trajectory, states

STATE = [{"role": "user", "content": "task"}]


def beta(value):
    return Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=value))


def fail(status, text="no"):
    async def behave(stub, http, request):
        return web.Response(status=status, text=text)

    return behave


async def test_every_turn_is_mixed_by_its_coin_recorded_and_labelled(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(seed=11, round=2, task_id="task-9")
        messages = await r.rollout(session, 12)
        recording = await session.finish()
    assert len(recording.turns) == 12
    assert {turn.actor for turn in recording.turns} == {Actor.STUDENT, Actor.TEACHER}
    for turn in recording.turns:
        assert turn.coin == coin(11, 2, "task-9", "00000", turn.index)
        assert turn.actor is (Actor.TEACHER if turn.coin < turn.beta else Actor.STUDENT)
        assert turn.action.message["content"] == f"{turn.actor} at {2 + 2 * turn.index}"
        assert turn.action.policy == {"student": "r001-0123456789ab", "teacher": "r000-ba9876543210"}[turn.actor]
        assert turn.label is not None
        assert turn.label.message["content"] == f"teacher at {2 + 2 * turn.index}"
        if turn.actor is Actor.TEACHER:
            assert turn.label == turn.action
    # Where the teacher acted, action and label are one call.
    assert len(teacher.requests) == 12
    assert len(student.requests) == sum(turn.actor is Actor.STUDENT for turn in recording.turns)
    priorities = [request["priority"] for request in teacher.requests]
    assert priorities.count(0) == sum(turn.actor is Actor.TEACHER for turn in recording.turns)
    assert set(priorities) == {0, 10}
    trajectory = Trajectory(
        run="r", round=2, rollout_id="00000", task_id="task-9", student="s", turns=recording.turns, outcome=Outcome.UNRESOLVED
    )
    visited = [{name: value for name, value in message.items() if value is not None} for message in messages]
    assert [list(state) for _, state, _ in states(trajectory)] == [visited[: 2 + 2 * i] for i in range(12)]
    assert (recording.failure, recording.policy_error, recording.limit_reached) == (None, None, False)
    assert r.registry.get_sample_value("dagger_gateway_labels_total", {"flaw": "None"}) == 12


async def test_the_same_rollout_again_is_mixed_and_sampled_the_same(student, teacher, rig):
    seen = []
    for _ in range(2):
        async with rig(student, teacher) as r:
            session = r.open()
            await r.rollout(session, 8)
            turns = (await session.finish()).turns
        seeds = sorted(request["seed"] for stub in (student, teacher) for request in stub.requests)
        seen.append(([(turn.actor, turn.coin, turn.action.message) for turn in turns], seeds))
        student.requests.clear()
        teacher.requests.clear()
    assert seen[0] == seen[1]
    assert len(set(seen[0][1])) == len(seen[0][1])


@pytest.mark.parametrize("mode", list(LabelMode))
async def test_labels_come_in_every_mode_and_at_their_time(student, teacher, rig, mode):
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0), labels=mode)
        await r.rollout(session, 3)
        asked = len(teacher.requests)
        recording = await session.finish()
    assert [turn.label.message["content"] for turn in recording.turns] == ["teacher at 2", "teacher at 4", "teacher at 6"]
    assert asked == {LabelMode.INLINE: 3, LabelMode.DEFERRED: 0}.get(mode, asked)
    assert recording.label_seconds > 0 < recording.acting_seconds


async def test_async_labels_do_not_hold_up_acting_and_finish_waits_for_them(student, teacher, rig):
    held = asyncio.Event()

    async def wait(stub, http, request):
        await held.wait()
        return web.json_response(stub.answer(request))

    teacher.always = wait
    async with rig(student, teacher, concurrency=2) as r:
        session = r.open(mixing=beta(0.0))
        await r.rollout(session, 6)
        finishing = asyncio.create_task(session.finish())
        await asyncio.sleep(0.1)
        assert not finishing.done()
        held.set()
        recording = await finishing
    assert all(turn.label and turn.label_flaw is None for turn in recording.turns)
    assert teacher.peak == 2


async def test_flawed_labels_are_recorded_as_such(student, teacher, rig):
    async def cut(stub, http, request):
        answer = stub.answer(request)
        answer["choices"][0]["finish_reason"] = "length"
        return web.json_response(answer)

    async with rig(student, teacher) as r:
        session = r.open(
            mixing=beta(0.0), labels=LabelMode.INLINE, label_check=lambda m: "no command" if m["content"].endswith(" 4") else None
        )
        teacher.script.extend([cut])
        await r.rollout(session, 2)
        teacher.always = fail(500)
        messages = [*STATE, {"role": "user", "content": "more"}, {"role": "user", "content": "and more"}]
        assert (await r.ask(session, messages))[0] == 200
        teacher.always = fail(400, "This model's maximum context length is 64 tokens")
        assert (await r.ask(session, [*messages, {"role": "user", "content": "too much"}]))[0] == 200
        recording = await session.finish()
        registry = r.registry
    flaws = [LabelFlaw.TRUNCATED, LabelFlaw.UNPARSABLE, LabelFlaw.REQUEST_FAILED, LabelFlaw.REFUSED]
    assert [turn.label_flaw for turn in recording.turns] == flaws
    assert [turn.label is None for turn in recording.turns] == [False, False, True, True]
    assert (recording.failure, recording.policy_error) == (None, None)
    for flaw in LabelFlaw:
        assert registry.get_sample_value("dagger_gateway_labels_total", {"flaw": flaw.value}) == 1


async def test_a_teachers_action_that_was_cut_off_is_no_label(student, teacher, rig):
    async def cut(stub, http, request):
        answer = stub.answer(request)
        answer["choices"][0]["finish_reason"] = "length"
        return web.json_response(answer)

    teacher.script.append(cut)
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(1.0))
        await r.ask(session, STATE)
        (turn,) = (await session.finish()).turns
    assert (turn.actor, turn.label_flaw) == (Actor.TEACHER, LabelFlaw.TRUNCATED)


@pytest.mark.parametrize("acts", [0.0, 1.0])
@pytest.mark.parametrize(
    ("reason", "tokens", "prompt", "flaw"),
    [
        ("tool_calls", 64, 10, LabelFlaw.TRUNCATED),
        ("tool_calls", 20, 980, LabelFlaw.TRUNCATED),  # vLLM cuts a turn where the context ends, below the spec's maxTokens
        ("tool_calls", 63, 10, None),
        ("stop", 64, 10, None),  # ended by itself, at its last token
        ("length", 3, 10, LabelFlaw.TRUNCATED),
        ("content_filter", 3, 10, LabelFlaw.TRUNCATED),
    ],
)
async def test_a_teachers_turn_that_did_not_end_by_itself_never_trains(student, teacher, rig, acts, reason, tokens, prompt, flaw):
    call = {"id": "1", "type": "function", "function": {"name": "bash", "arguments": "{}"}}

    async def ended(stub, http, request):
        answer = stub.answer(request, tool_calls=[call])
        answer["choices"][0]["finish_reason"] = reason
        answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": tokens}
        return web.json_response(answer)

    teacher.always = ended
    async with rig(student, teacher, teacher_changes={"context": 1000}) as r:
        session = r.open(mixing=beta(acts))
        await r.ask(session, STATE)
        (turn,) = (await session.finish()).turns
    assert (turn.label.finish_reason, turn.label_flaw) == (reason, flaw)


async def test_evaluation_is_greedy_without_teacher_or_labels(student, rig):
    async with rig(student, None) as r:
        session = r.open(mixing=None)
        await r.rollout(session, 3)
        recording = await session.finish()
    assert all(request["temperature"] == 0.0 for request in student.requests)
    assert all(turn.label is None and turn.label_flaw is None and turn.beta == 0.0 for turn in recording.turns)


async def test_a_policy_that_is_down_ends_the_rollout_and_nobody_steps_in(student, teacher, rig):
    student.always = fail(500)
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        status, answer = await r.ask(session, STATE)
        assert (status, answer["error"]["code"]) == (503, "policy_unavailable")
        asked = len(student.requests)
        assert (await r.ask(session, [*STATE, {"role": "user", "content": "again"}]))[0] == 503
        assert len(student.requests) == asked == 3
        recording = await session.finish()
    assert recording.failure.reason == "ServerError"
    assert recording.turns == ()
    assert all(request["priority"] == 10 for request in teacher.requests)


async def test_a_context_that_is_too_long_is_the_policys_own_end(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        await r.rollout(session, 2)
        student.always = fail(400, "This model's maximum context length is 64 tokens")
        status, answer = await r.ask(session, [*STATE, {"role": "user", "content": "x" * 1000}])
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert (await r.ask(session, STATE))[0] == 400
        recording = await session.finish()
    assert (recording.failure, recording.policy_error.reason) == (None, "ContextTooLong")
    assert [turn.label is not None for turn in recording.turns] == [True, True]


@pytest.mark.parametrize("mode", list(LabelMode))
async def test_an_agent_that_shortens_a_context_that_was_too_long_goes_on(student, teacher, rig, mode):
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0), labels=mode)
        messages = await r.rollout(session, 2)
        student.script.append(fail(400, "This model's maximum context length is 64 tokens"))
        for _ in range(2):
            status, answer = await r.ask(session, messages)
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert len(student.requests) == 3  # the same state again is refused from the record
        condensed = [messages[0], {"role": "user", "content": "what happened so far, in short"}]
        assert (await r.ask(session, condensed))[0] == 200
        recording = await session.finish()
    assert (recording.failure, recording.policy_error) == (None, None)
    assert [turn.index for turn in recording.turns] == [0, 1, 2]
    record = Trajectory(run="r", round=1, rollout_id="0", task_id="t", student="s", turns=recording.turns, outcome=Outcome.RESOLVED)
    *_, (turn, state, _) = states(record)
    assert state == tuple(condensed)
    assert turn.label.message["content"] == "teacher at 2"


async def test_a_refusal_that_is_not_for_length_is_for_good(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        student.script.append(fail(400, "no"))
        assert [(await r.ask(session, [*STATE, {"role": "user", "content": text}]))[0] for text in ("one", "two")] == [400, 400]
        recording = await session.finish()
    assert (recording.policy_error.reason, len(student.requests)) == ("BadRequest", 1)


async def test_the_turn_limit_is_a_409_and_the_last_turn_can_still_be_read_again(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(max_turns=2)
        messages = await r.rollout(session, 2)
        assert (await r.ask(session, messages[:4]))[0] == 200
        status, answer = await r.ask(session, messages)
        assert (status, answer["error"]["code"]) == (409, "turn_limit")
        recording = await session.finish()
    assert recording.limit_reached
    assert len(recording.turns) == 2


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


async def test_tools_are_recorded_where_they_change(student, teacher, rig):
    bash, edit = ({"type": "function", "function": {"name": name}} for name in ("bash", "edit"))
    async with rig(student, teacher) as r:
        session = r.open()
        for number, tools in enumerate([[bash], [bash], [bash, edit], None]):
            await r.ask(session, [*STATE, {"role": "user", "content": str(number)}], tools=tools)
        recording = await session.finish()
    assert [turn.tools for turn in recording.turns] == [(bash,), None, (bash, edit), ()]


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


@pytest.mark.parametrize("mode", [LabelMode.ASYNC, LabelMode.INLINE])
async def test_abort_cancels_what_was_asked_of_the_policies(student, teacher, rig, mode):
    student.delay = teacher.delay = 60
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0), labels=mode)
        asking = asyncio.create_task(r.ask(session, STATE))
        while not (student.active and teacher.active):
            await asyncio.sleep(0.01)
        await session.abort()
        assert (await asking)[0] == 410
        async with asyncio.timeout(10):
            while student.active or teacher.active:
                await asyncio.sleep(0.01)
    assert (student.cancelled, teacher.cancelled) == (1, 1)


async def test_finish_drops_a_turn_that_nobody_will_execute_and_starts_no_other(student, teacher, rig):
    student.delay = 60
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0), labels=LabelMode.DEFERRED)
        asking = [asyncio.create_task(r.ask(session, [*STATE, {"role": "user", "content": str(i)}])) for i in range(3)]
        while not student.active:
            await asyncio.sleep(0.01)
        recording = await asyncio.wait_for(session.finish(), timeout=10)
        assert {status for status, _ in await asyncio.gather(*asking)} <= {401, 410}
    assert recording.turns == ()
    assert (len(student.requests), len(teacher.requests)) == (1, 0)


async def test_a_turn_dropped_while_its_policy_fails_is_the_policys_failure(student, teacher, rig):
    student.always = fail(500)
    async with rig(student, teacher, student_changes={"attempts": 1000}) as r:
        session = r.open(mixing=beta(0.0))
        asking = asyncio.create_task(r.ask(session, STATE))
        while len(student.requests) < 2:
            await asyncio.sleep(0.01)
        recording = await asyncio.wait_for(session.finish(), timeout=10)
        assert (await asking)[0] == 410
    assert recording.failure is not None and recording.failure.reason == "ServerError"


async def test_a_turn_dropped_while_its_policy_is_slow_is_nobodys_failure(student, teacher, rig):
    student.script.append(fail(500))  # a turn that came after all is forgotten
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        await r.rollout(session, 1)
        student.delay = 60
        asking = asyncio.create_task(r.ask(session, [*STATE, {"role": "user", "content": "on"}]))
        while not student.active:
            await asyncio.sleep(0.01)
        recording = await asyncio.wait_for(session.finish(), timeout=10)
        assert (await asking)[0] == 410
    assert (len(recording.turns), recording.failure, recording.policy_error) == (1, None, None)


async def test_how_long_a_policy_was_silent_at_the_end_is_recorded(student, teacher, rig):
    async with rig(student, teacher) as r:
        answered, session = r.open(mixing=beta(0.0)), r.open(mixing=beta(0.0), rollout_id="00001")
        await r.rollout(answered, 1)
        assert (await answered.finish()).silence is None
        student.delay = 60
        asking = asyncio.create_task(r.ask(session, STATE))
        while not student.active:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        silence = (await session.finish()).silence
        await asking
    assert (silence.actor, 0.5 <= silence.seconds < 60) == (Actor.STUDENT, True)


async def test_a_policy_is_heard_from_by_every_part_of_its_stream(student, teacher, rig):
    async def halting(stub, http, request):
        await asyncio.sleep(1.0)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        await response.write(b"data: %b\n\n" % json.dumps(stub.chunks(request)[1]).encode())
        await asyncio.sleep(60)
        return response

    student.always = halting
    async with rig(student, teacher) as r:
        session, began = r.open(mixing=beta(0.0)), time.monotonic()
        headers = {"Authorization": f"Bearer {session.token}"}
        body = {"messages": STATE, "stream": True}
        async with r.http.post(f"{session.base_url}/chat/completions", json=body, headers=headers) as response:
            assert await response.content.readany()
            silence = (await session.finish()).silence
    assert silence.seconds <= time.monotonic() - began - 1.0


async def test_a_bug_in_a_label_check_comes_out_and_is_no_flaw(student, teacher, rig):
    def broken(message):
        raise KeyError("content")

    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0), label_check=broken)
        await r.rollout(session, 2)
        with pytest.raises(KeyError):
            await session.finish()


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


async def test_what_a_gateway_cannot_do_is_refused_when_the_rollout_is_opened(student, rig):
    async with rig(student, None) as r:
        with pytest.raises(ValueError, match="no teacher"):
            r.open()
        with pytest.raises(ValueError, match="made for 'r001-0123456789ab'"):
            r.open(mixing=None, student="r002-000000000000")
        r.open(mixing=None)
        with pytest.raises(ValueError, match="open already"):
            r.open(mixing=None)


async def test_512_rollouts_at_once_lose_no_turn(student, teacher, rig):
    student.delay = teacher.delay = 0.2
    async with rig(student, teacher) as r:
        sessions = [r.open(rollout_id=f"{number:05}", task_id=f"task-{number}") for number in range(512)]
        await asyncio.gather(*(r.rollout(session, 3) for session in sessions))
        recordings = await asyncio.gather(*(session.finish() for session in sessions))
    turns = [turn for recording in recordings for turn in recording.turns]
    assert len(turns) == 512 * 3
    assert all(turn.label is not None and turn.label_flaw is None for turn in turns)
    assert len(teacher.requests) == 512 * 3
    assert teacher.peak > 64  # acting is not held to the labels' concurrency
