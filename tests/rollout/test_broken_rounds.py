"""Rounds in which policies, sandboxes or tasks break: whose fault it is, and what becomes of the rollout."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from dagger_operator.evaluation.stage import evaluate
from dagger_operator.rollout.round import rollout
from dagger_operator.sandbox.interface import CommandResult, LimitExceeded
from dagger_operator.sandbox.process_sandbox import ProcessSandbox
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import read_manifest, training_set
from dagger_operator.store.records import Outcome
from dagger_operator.store.stage import StageFailure
from dagger_operator.store.trajectories import finished
from rollout.gathered import result_of, trajectories, until


def unavailable(model: str) -> Callable[[str, list[dict[str, Any]]], web.Response | None]:
    return lambda asked, messages: web.json_response({"error": "away"}, status=503) if asked == model else None


async def test_a_teacher_that_is_away_fails_the_round_and_a_resume_runs_what_it_broke(ground: Any) -> None:
    run = ground.run(train=4, rollouts={"concurrency": 4, "leaseSeconds": 4, "infrastructureRetries": 0})
    broken = "right 2"
    ground.policies.fault = lambda model, messages: (
        web.json_response({"error": "away"}, status=503) if model == "teacher" and broken in str(messages) else None
    )
    with pytest.raises(StageFailure) as caught:
        await rollout(ground.stage(run))
    failure = caught.value
    assert (failure.reason, failure.permanent) == ("TooFewValidRollouts", True)
    assert "1 of 4 rollouts (1 ServerError" in failure.message or "1 of 4 rollouts (1 LabelsUnavailable" in failure.message
    store = ground.store(run)
    assert await read_manifest(store, 1) is None and len(await finished(store, 1, Kind.ROLLOUT)) == 3
    ground.policies.fault = lambda model, messages: None
    ground.policies.requests.clear()
    await rollout(ground.stage(run))
    assert all(broken in str(messages) for _, messages, _ in ground.policies.requests), "finished rollouts were run again"
    assert (await result_of(store)).summary.outcomes.get("InfrastructureFailure", 0) == 0


async def test_a_student_that_restarts_for_longer_than_all_pauses_breaks_no_rollout(ground: Any) -> None:
    settings = {"concurrency": 4, "leaseSeconds": 4, "infrastructureRetries": 1}
    run = ground.run(train=6, student={"model": "student", "serving": {"gpus": 0}}, rollouts=settings)
    stage, server = ground.stage(run), ground.policies
    server.serves = stage.policy

    def restarting(model: str, messages: list[dict[str, Any]]) -> web.Response | None:
        if model != stage.policy:
            return None
        server.serves = None
        return web.json_response({"error": "away"}, status=503)

    server.fault = restarting
    working = asyncio.create_task(rollout(stage))
    await until(lambda: server.serves is None)
    await asyncio.sleep(6)
    assert not working.done(), "its tries were spent while the student was away"
    server.serves, server.fault = stage.policy, lambda model, messages: None
    await asyncio.wait_for(working, 60)
    result = await result_of(ground.store(run))
    assert (result.excluded, result.summary.label_coverage) == ({}, 1.0)
    assert max(t.tries for t in await trajectories(ground.store(run))) == 2


async def test_a_policy_that_fails_until_a_rollouts_deadline_is_infrastructure_and_no_limit(ground: Any) -> None:
    settings = {"concurrency": 2, "leaseSeconds": 4, "infrastructureRetries": 0, "timeoutSeconds": 3}
    run = ground.run(held_out=2, labels={"attempts": 20}, rollouts=settings)
    ground.policies.fault = unavailable("student")
    with pytest.raises(StageFailure, match=r"2 of 2 rollouts \(2 ServerError"):
        await evaluate(ground.stage(run, kind="evaluation"))


async def test_a_policy_that_takes_requests_and_never_answers_is_infrastructure_and_no_limit(ground: Any) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        ground.policies.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        settings = {"concurrency": 2, "leaseSeconds": 4, "infrastructureRetries": 0, "timeoutSeconds": 3}
        with pytest.raises(StageFailure, match=r"2 of 2 rollouts \(2 PolicySilent"):
            await evaluate(ground.stage(ground.run(held_out=2, rollouts=settings), kind="evaluation"))


async def test_a_round_goes_on_without_the_few_that_infrastructure_broke(ground: Any) -> None:
    run = ground.run(train=4, rollouts={"concurrency": 2, "leaseSeconds": 4, "infrastructureRetries": 1, "minValidFraction": 0.5})
    ground.policies.fault = lambda model, messages: web.Response(text="no json") if "right 1" in str(messages) else None
    await rollout(ground.stage(run))
    result = await result_of(ground.store(run))
    assert result.excluded == {"Garbled": 1}
    assert (result.summary.rollouts, result.summary.outcomes["InfrastructureFailure"]) == (4, 1)
    (lost,) = [t for t in await trajectories(ground.store(run)) if t.outcome is Outcome.INFRASTRUCTURE_FAILURE]
    assert (lost.task_id, lost.turns, lost.tries, lost.patch) == ("repair-1", (), 2, "")
    data = await training_set(ground.store(run), 1, run.spec.training.aggregation)
    assert "repair-1" not in {trajectory.task_id async for trajectory in data.trajectories()}


async def test_a_teacher_whose_turns_cannot_be_run_is_named_as_the_cause(ground: Any) -> None:
    run = ground.run(train=2, mixing={"beta": {"type": "Constant", "value": 0.0}})
    answer = {"id": "x", "object": "chat.completion", "model": "teacher"}
    choice = {"index": 0, "message": {"role": "assistant", "content": "I would rather talk."}, "finish_reason": "stop"}
    ground.policies.fault = lambda model, messages: web.json_response(answer | {"choices": [choice]}) if model == "teacher" else None
    with pytest.raises(StageFailure) as caught:
        await rollout(ground.stage(run))
    assert (caught.value.reason, caught.value.permanent) == ("LabelCoverageTooLow", True)
    assert "Unparsable (make a new run, " in caught.value.message and "0 of 2 rollouts are made again" in caught.value.message
    assert len(await finished(ground.store(run), 1, Kind.ROLLOUT)) == 2, "no edit mends them, and they were forgotten"


async def test_a_teacher_whose_endpoint_filters_its_turns_is_named_as_the_cause_and_not_asked_again(ground: Any) -> None:
    run = ground.run(train=2, mixing={"beta": {"type": "Constant", "value": 0.0}})
    answer = {"id": "x", "object": "chat.completion", "model": "teacher"}
    choice = {"index": 0, "message": {"role": "assistant", "content": "First I"}, "finish_reason": "content_filter"}
    ground.policies.fault = lambda model, messages: web.json_response(answer | {"choices": [choice]}) if model == "teacher" else None
    with pytest.raises(StageFailure, match=r"LabelCoverageTooLow.*ended them as content_filter.*0 of 2 rollouts are made again") as caught:
        await rollout(ground.stage(run))
    assert "maxTokens" not in caught.value.message, "more tokens do not help"
    assert len(await finished(ground.store(run), 1, Kind.ROLLOUT)) == 2


async def test_a_context_that_is_too_long_is_the_policys_own_error_and_not_tried_again(ground: Any) -> None:
    run = ground.run(train=2, mixing={"beta": {"type": "Constant", "value": 0.0}}, labels={"minCoverage": 0.0, "attempts": 1})
    refusal = {"error": {"message": "maximum context length is 64 tokens", "code": "context_length_exceeded"}}
    ground.policies.fault = lambda model, messages: (
        web.json_response(refusal, status=400) if model == "student" and len(messages) > 3 else None
    )
    await rollout(ground.stage(run))
    ended = await trajectories(ground.store(run))
    refused = [t for t in ended if t.outcome is Outcome.POLICY_ERROR]
    assert refused and {(t.exit_status, t.tries) for t in refused} == {("ContextTooLong", 1)}


async def test_a_task_whose_setup_fails_is_infrastructure(ground: Any) -> None:
    run = ground.run(train=1, rollouts={"infrastructureRetries": 0})
    path = ground.root / "train.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"setup": "exit 7"}) + "\n")
    with pytest.raises(StageFailure, match="infrastructure broke 1 of 1"):
        await rollout(ground.stage(run))


def evicted_at(monkeypatch: pytest.MonkeyPatch, beginning: str) -> None:
    """Sandboxes that are gone from a command on, as a pod is that its kubelet evicts for its disk; a real one takes a cluster."""
    execute, gone = ProcessSandbox.execute, set[ProcessSandbox]()

    async def executed(sandbox: ProcessSandbox, command: str, **more: Any) -> CommandResult:
        if sandbox in gone or command.startswith(beginning):
            gone.add(sandbox)
            raise LimitExceeded("Evicted", "Pod ephemeral local storage usage exceeds the total limit of containers 10304Mi. ")
        return await execute(sandbox, command, **more)

    monkeypatch.setattr(ProcessSandbox, "execute", executed)


async def test_an_agent_that_exceeds_its_sandboxs_limits_has_reached_a_limit(ground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evicted_at(monkeypatch, "sed -i")
    run = ground.run(train=3, mixing={"beta": {"type": "Constant", "value": 1.0}})
    await rollout(ground.stage(run))
    ended = await trajectories(ground.store(run))
    assert {(t.outcome, t.exit_status, t.submitted, t.patch, t.tries) for t in ended} == {
        (Outcome.LIMIT_REACHED, "LimitReached", False, "", 1)
    }
    assert all([turn.label is not None for turn in t.turns] == [True, True] for t in ended), "its turns train as any others do"
    result = await result_of(ground.store(run))
    assert (result.summary.labels, result.excluded) == (6, {})


async def test_a_patch_that_exceeds_its_sandboxs_limits_is_unresolved(ground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evicted_at(monkeypatch, "sh check.sh")
    run = ground.run(train=2, mixing={"beta": {"type": "Constant", "value": 1.0}})
    await rollout(ground.stage(run))
    ended = await trajectories(ground.store(run))
    assert {(t.outcome, t.submitted, t.tries) for t in ended} == {(Outcome.UNRESOLVED, True, 1)}
    assert all("+right" in t.patch for t in ended)


async def test_a_task_that_exceeds_its_sandboxs_limits_before_the_agent_acts_is_infrastructure(
    ground: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    evicted_at(monkeypatch, "")
    with pytest.raises(StageFailure, match=r"infrastructure broke 1 of 1 rollouts \(1 Evicted"):
        await rollout(ground.stage(ground.run(train=1, rollouts={"infrastructureRetries": 0})))
