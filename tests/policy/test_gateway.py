"""What the gateway promises a scaffold and the record, whatever the scaffold, the network and the policies do."""

import asyncio
import json
import time

import pytest
from aiohttp import web

from dagger_operator.api import LabelMode, Role
from dagger_operator.policy.coins import coin
from dagger_operator.store.records import LabelFlaw, Outcome, Trajectory, states
from policy.played import STATE, beta, fail


async def test_every_turn_is_mixed_by_its_coin_recorded_and_labelled(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(seed=11, round=2, task_id="task-9")
        messages = await r.rollout(session, 12)
        recording = await session.finish()
    assert len(recording.turns) == 12
    assert {turn.actor for turn in recording.turns} == {Role.STUDENT, Role.TEACHER}
    for turn in recording.turns:
        assert turn.coin == coin(11, 2, "task-9", "00000", turn.index)
        assert turn.actor is (Role.TEACHER if turn.coin < turn.beta else Role.STUDENT)
        assert turn.action.message["content"] == f"{turn.actor} at {2 + 2 * turn.index}"
        assert turn.action.policy == {"student": "r001-0123456789ab", "teacher": "r000-ba9876543210"}[turn.actor]
        assert turn.label is not None
        assert turn.label.message["content"] == f"teacher at {2 + 2 * turn.index}"
        if turn.actor is Role.TEACHER:
            assert turn.label == turn.action
    # Where the teacher acted, action and label are one call.
    assert len(teacher.requests) == 12
    assert len(student.requests) == sum(turn.actor is Role.STUDENT for turn in recording.turns)
    priorities = [request["priority"] for request in teacher.requests]
    assert priorities.count(0) == sum(turn.actor is Role.TEACHER for turn in recording.turns)
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
    assert (turn.actor, turn.label_flaw) == (Role.TEACHER, LabelFlaw.TRUNCATED)


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


async def test_evaluation_is_without_teacher_or_labels(student, rig):
    async with rig(student, None) as r:
        session = r.open(mixing=None)
        await r.rollout(session, 3)
        recording = await session.finish()
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


async def test_tools_are_recorded_where_they_change(student, teacher, rig):
    bash, edit = ({"type": "function", "function": {"name": name}} for name in ("bash", "edit"))
    async with rig(student, teacher) as r:
        session = r.open()
        for number, tools in enumerate([[bash], [bash], [bash, edit], None]):
            await r.ask(session, [*STATE, {"role": "user", "content": str(number)}], tools=tools)
        recording = await session.finish()
    assert [turn.tools for turn in recording.turns] == [(bash,), None, (bash, edit), ()]


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
