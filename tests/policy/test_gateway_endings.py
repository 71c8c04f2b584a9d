"""Rollouts that are ended while a turn is under way: what is recorded, and whose failure it is."""

import asyncio

import pytest

from dagger_operator.api import LabelMode, Role
from policy.played import STATE, beta, fail


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
    assert (silence.actor, 0.5 <= silence.seconds < 60) == (Role.STUDENT, True)
