"""The stages as a runtime starts them: from the environment to a result in the store."""

import asyncio
import contextlib
import json
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from dagger_operator.evaluation.stage import evaluate
from dagger_operator.rollout.round import rollout
from dagger_operator.sandbox import isolation
from dagger_operator.sandbox.interface import CommandResult, LimitExceeded
from dagger_operator.sandbox.process_sandbox import ProcessSandbox
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import RoundManifest, read_manifest, training_set
from dagger_operator.store.objects import Store
from dagger_operator.store.records import Actor, LabelFlaw, Outcome, Trajectory, labelled_states
from dagger_operator.store.results import EvaluationResult, RolloutResult, read_result
from dagger_operator.store.stage import ExitCode, Stage, StageFailure
from dagger_operator.store.trajectories import finished, read_trajectories, write_trajectory


async def trajectories(store: Store, kind: Kind = Kind.ROLLOUT) -> list[Trajectory]:
    return [trajectory async for trajectory in read_trajectories(store, 1, kind)]


async def test_a_round_goes_from_tasks_to_labels_that_train(ground: Any) -> None:
    run = ground.run(train=6)
    await rollout(ground.stage(run))
    store = ground.store(run)
    result = await read_result(store, 1, "rollout", RolloutResult)
    assert result is not None
    summary = result.summary
    assert (summary.rollouts, summary.label_coverage, summary.nominal_beta, result.excluded) == (6, 1.0, 0.4, {})
    ended = await trajectories(store)
    turns = [turn for trajectory in ended for turn in trajectory.turns]
    assert summary.turns == len(turns) == summary.labels
    assert 0.0 < summary.teacher_turn_share == sum(turn.actor is Actor.TEACHER for turn in turns) / len(turns) < 1.0
    assert summary.agreement is not None and 0.0 < summary.agreement < 1.0
    assert all((turn.coin < turn.beta) == (turn.actor is Actor.TEACHER) for turn in turns)
    # What the trainer reads is the same data.
    data = await training_set(store, 1, run.spec.training.aggregation)
    assert sum([len(list(labelled_states(trajectory))) async for trajectory in data.trajectories()]) == summary.labels
    resolved = [trajectory for trajectory in ended if trajectory.outcome is Outcome.RESOLVED]
    assert resolved and all("+right" in trajectory.patch for trajectory in resolved)
    manifest = await read_manifest(store, 1)
    assert manifest is not None and (manifest.digest, manifest.data_digest) == (result.manifest_digest, summary.data_digest)


AGENT = r"""
import json, os, subprocess, urllib.request
messages = [{"role": "system", "content": "s"}, {"role": "user", "content": os.environ["DAGGER_TASK_STATEMENT"]}]
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
while True:
    body = json.dumps({"model": "policy", "messages": messages}).encode()
    answer = urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers))
    action = json.load(answer)["choices"][0]["message"]
    command = action["content"].split("```mswea_bash_command")[-1].strip("`\n")
    if "COMPLETE_TASK" in command:
        break
    shell = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    messages += [{"role": "assistant", "content": action["content"]}, {"role": "user", "content": shell.stdout}]
"""


async def test_a_round_can_be_made_by_any_program_in_the_sandbox(ground: Any) -> None:
    run = ground.run(train=2, scaffold={"type": "Command", "command": ["python3", "agent.py"], "maxTurns": 8})
    rows = [json.loads(line) for line in (ground.root / "train.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"files": row["files"] | {"agent.py": AGENT}}) + "\n" for row in rows)
    (ground.root / "train.jsonl").write_text(text)
    await rollout(ground.stage(run))
    ended = await trajectories(ground.store(run))
    assert all(t.turns and t.outcome is not Outcome.INFRASTRUCTURE_FAILURE for t in ended)
    assert any(t.outcome is Outcome.RESOLVED and "+right" in t.patch and "agent.py" not in t.patch for t in ended)


async def test_a_finished_stage_ends_at_once(ground: Any) -> None:
    run = ground.run(train=2)
    await rollout(ground.stage(run))
    asked = len(ground.policies.requests)
    await rollout(ground.stage(run))
    assert len(ground.policies.requests) == asked


async def test_the_same_seed_gathers_the_same_data(ground: Any) -> None:
    digests = []
    for name in ("one", "two"):
        run = ground.run(train=3, storage={"url": f"file://{ground.root}/{name}"}, rollouts={"concurrency": 3 if name == "one" else 1})
        await rollout(ground.stage(run))
        manifest = await read_manifest(ground.store(run), 1)
        assert manifest is not None
        digests.append(manifest.data_digest)
    assert digests[0] == digests[1]


async def test_evaluation_is_the_student_alone_and_greedy_on_held_out_tasks(ground: Any) -> None:
    run = ground.run(held_out=8, evaluation={"maxTurns": 6})
    stage = ground.stage(run, kind="evaluation")
    await evaluate(stage)
    result = await read_result(ground.store(run), 1, "evaluation", EvaluationResult)
    assert result is not None
    assert {model for model, _, _ in ground.policies.requests} == {"student"}
    assert {body["temperature"] for _, _, body in ground.policies.requests} == {0.0}
    ended = await trajectories(ground.store(run), Kind.EVALUATION)
    assert all(turn.label is None for trajectory in ended for turn in trajectory.turns)
    assert max(len(trajectory.turns) for trajectory in ended) <= 6
    assert set(result.resolved_tasks) | set(result.unresolved_tasks) == {f"repair-{number}" for number in range(1000, 1008)}
    by_task = {trajectory.task_id: trajectory for trajectory in ended}
    assert all(by_task[task].outcome is Outcome.RESOLVED for task in result.resolved_tasks)
    false_submits = [t for t in ended if t.submitted and t.outcome is Outcome.UNRESOLVED]
    # The student submits too early on some of these tasks: were it otherwise, the count below would prove nothing.
    assert len(false_submits) == result.summary.false_submits > 0
    assert 0 < result.summary.resolved < 8
    assert result.summary.policy == stage.policy


async def test_every_round_deals_and_holds_out_what_the_run_began_with(ground: Any) -> None:
    run = ground.run(train=3, held_out=3)
    await rollout(ground.stage(run))
    ground.run(train=3, held_out=2)
    with pytest.raises(StageFailure, match=r"TasksChanged: spec\.tasks\.heldOut.*repair-1002"):
        await evaluate(ground.stage(run, kind="evaluation"))
    ground.run(train=4, held_out=3)
    with pytest.raises(StageFailure, match=r"TasksChanged: spec\.tasks\.source.*repair-3"):
        await rollout(ground.stage(run, round_number=2))
    assert not await finished(ground.store(run), 2, Kind.ROLLOUT)
    ground.run(train=3, held_out=3)
    await evaluate(ground.stage(run, kind="evaluation"))
    await rollout(ground.stage(run, round_number=2))


@pytest.mark.parametrize(("kind", "work"), [(Kind.ROLLOUT, rollout), (Kind.EVALUATION, evaluate)])
async def test_a_trajectory_of_another_task_than_was_dealt_counts_for_nothing(ground: Any, kind: Kind, work: Callable[..., Any]) -> None:
    """Whatever put it there: a count that leaves it out would be of another set of tasks."""
    run = ground.run(train=2, held_out=2)
    stage, store = ground.stage(run, kind=kind.value), ground.store(run)
    other = Trajectory(
        run="test", round=1, rollout_id="t00001-a0", task_id="of-another-deal", student="s", turns=(), outcome=Outcome.RESOLVED
    )
    await write_trajectory(store, kind, other)
    with pytest.raises(
        StageFailure, match=f"TasksChanged: {layout.trajectory(1, kind, 't00001-a0')} is of task of-another-deal, .*repair-"
    ):
        await work(stage)
    assert not await store.exists(layout.result(1, kind)) and not await store.exists(layout.manifest(1))
    await store.delete(layout.trajectory(1, kind, "t00001-a0"))
    await work(stage)
    assert await store.exists(layout.result(1, kind))


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
    assert (await _result(store)).summary.outcomes.get("InfrastructureFailure", 0) == 0


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
    await _until(lambda: server.serves is None)
    await asyncio.sleep(6)
    assert not working.done(), "its tries were spent while the student was away"
    server.serves, server.fault = stage.policy, lambda model, messages: None
    await asyncio.wait_for(working, 60)
    result = await _result(ground.store(run))
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
    result = await _result(ground.store(run))
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


@pytest.mark.parametrize("flaw", [LabelFlaw.TRUNCATED, LabelFlaw.REFUSED])
async def test_who_does_what_is_said_of_low_coverage_gets_a_whole_round(ground: Any, flaw: LabelFlaw) -> None:
    def run(max_tokens: int) -> Any:
        teacher = {"model": "teacher", "endpoint": {"url": ground.policies.url}, "sampling": {"maxTokens": max_tokens}}
        return ground.run(train=3, mixing={"beta": {"type": "Constant", "value": 0.0}}, teacher=teacher)

    def short(model: str, messages: list[dict[str, Any]]) -> web.Response | None:
        if model != "teacher" or "right 1" not in str(messages) or ground.policies.requests[-1][2]["max_tokens"] > 100:
            return None
        if flaw is LabelFlaw.REFUSED:
            return web.json_response({"error": {"code": "context_length_exceeded"}}, status=400)
        choice = {"index": 0, "message": {"role": "assistant", "content": "First I"}, "finish_reason": "length"}
        return web.json_response({"id": "x", "object": "chat.completion", "model": model, "choices": [choice]})

    ground.policies.fault = short
    with pytest.raises(StageFailure, match=rf"LabelCoverageTooLow.*{flaw}.*1 of 3 rollouts") as caught:
        await rollout(ground.stage(run(10)))
    assert caught.value.permanent
    ground.policies.requests.clear()
    await rollout(ground.stage(run(4096)))
    result = await _result(ground.store(run(4096)))
    assert (result.summary.rollouts, result.summary.label_coverage, result.excluded) == (3, 1.0, {})
    assert all("right 1" in str(messages) for _, messages, _ in ground.policies.requests), "whole rollouts were made again"
    assert {t.tries for t in await trajectories(ground.store(run(4096)))} == {1}


async def test_a_gate_that_was_made_stricter_forgets_nothing_of_a_closed_round(ground: Any) -> None:
    run = ground.run(train=3, rollouts={"concurrency": 2, "leaseSeconds": 4, "infrastructureRetries": 0, "minValidFraction": 0.5})
    ground.policies.fault = lambda model, messages: web.Response(text="no json") if "right 1" in str(messages) else None
    await rollout(ground.stage(run))
    store, result = ground.store(run), await _result(ground.store(run))
    await store.delete(layout.result(1, "rollout"))  # as if who closed it had died before it said so
    await rollout(ground.stage(ground.run(train=3, rollouts={"concurrency": 2, "leaseSeconds": 4, "minValidFraction": 1.0})))
    assert await _result(store) == result and len(await finished(store, 1, Kind.ROLLOUT)) == 3


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
    result = await _result(ground.store(run))
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


@pytest.fixture
def no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without it."""
    real = shutil.which
    monkeypatch.setattr(isolation.shutil, "which", lambda name, *more: None if name == "bwrap" else real(name, *more))


async def test_nothing_is_run_unconfined_unless_the_spec_allows_it(ground: Any, no_bubblewrap: None) -> None:
    with pytest.raises(StageFailure) as caught:
        await rollout(ground.stage(ground.run(train=1)))
    assert (caught.value.reason, caught.value.permanent) == ("NoNamespaces", True)
    assert "bwrap is not installed" in caught.value.message and "spec.sandbox.allowUnconfined: true" in caught.value.message
    assert not ground.policies.requests
    run = ground.run(train=1, sandbox={"commandTimeoutSeconds": 20, "limits": {"processes": 64}, "allowUnconfined": True})
    await rollout(ground.stage(run))
    assert (await _result(ground.store(run))).summary.rollouts == 1


async def _result(store: Store) -> RolloutResult:
    result = await read_result(store, 1, "rollout", RolloutResult)
    assert result is not None
    return result


async def start(ground: Any, run: Any, index: int = 0, module: str = "rollout") -> asyncio.subprocess.Process:
    environ = ground.environ(run, index=index, kind=module)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"dagger_operator.{module}", env=environ, stdout=asyncio.subprocess.PIPE
    )


async def test_the_command_logs_what_it_does_and_never_a_token(ground: Any) -> None:
    run = ground.run(train=2)
    environ = ground.environ(run) | {"DAGGER_TEACHER_TOKEN": "sk-teacher-secret"}
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dagger_operator.rollout", env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(worker.communicate(), 120)
    assert (worker.returncode, err) == (ExitCode.DONE, b"")
    lines = [json.loads(line) for line in out.splitlines()]
    ended = [line for line in lines if line["event"] == "rollout finished"]
    assert len(ended) == 2
    assert {"run", "round", "task", "rollout", "worker", "outcome", "turns"} <= ended[0].keys()
    assert b"sk-teacher-secret" not in out
    everything = b"".join(path.read_bytes() for path in ground.root.rglob("*") if path.is_file() and "store" in path.parts)
    assert b"sk-teacher-secret" not in everything


async def test_prometheus_reads_a_worker_while_it_works(ground: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ground.run(train=6)
    working = asyncio.create_task(rollout(Stage.from_environment(ground.environ(run) | {"DAGGER_METRICS_PORT": str(port)})))
    said = ""
    async with aiohttp.ClientSession() as http, asyncio.timeout(60):
        while not working.done():
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
                    said = await response.text()
            await asyncio.sleep(0.02)
    await working
    # One exposition for the worker and its gateway; nothing in it grows with the number of tasks.
    assert "dagger_rollouts_under_way" in said and "dagger_gateway_turns_total" in said and "dagger_sandbox_command_seconds_count" in said
    assert "repair-" not in said and "t0000" not in said


async def test_a_worker_that_is_asked_to_end_ends_and_the_next_goes_on(ground: Any) -> None:
    run = ground.run(train=6, rollouts={"concurrency": 2, "leaseSeconds": 30})
    worker = await start(ground, run)
    await _until(lambda: len(ground.policies.requests) > 4)
    worker.send_signal(signal.SIGTERM)
    await asyncio.wait_for(worker.communicate(), 60)
    assert worker.returncode == ExitCode.UNAVAILABLE
    began = time.monotonic()
    await rollout(ground.stage(run))
    assert time.monotonic() - began < 25, "claims were not given back"
    assert (await _result(ground.store(run))).summary.rollouts == 6


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.heavy
@pytest.mark.timeout(600)
async def test_workers_killed_again_and_again_lose_and_double_nothing(ground: Any) -> None:
    """kill -9 at random moments; the data set is the one of a run that nobody disturbed."""
    count, workers = 24, 2
    # On a busy machine a worker is killed many times before it ends a rollout.
    settings = {"workers": workers, "concurrency": 3, "leaseSeconds": 2, "infrastructureRetries": 100}
    calm = ground.run(train=count, rollouts=settings, storage={"url": f"file://{ground.root}/calm"})
    await rollout(ground.stage(calm))
    undisturbed = await read_manifest(ground.store(calm), 1)

    run = ground.run(train=count, rollouts=settings)
    store, rng = ground.store(run), random.Random(7)
    lives: dict[int, asyncio.subprocess.Process] = {}
    kills, seen = 0, dict[str, bytes]()

    async def finished_objects() -> dict[str, bytes]:
        found = {}
        for info in await store.list(layout.trajectories(1, Kind.ROLLOUT)):
            entry = await store.get(info.key)
            assert entry is not None
            found[info.key] = entry.data
        return found

    try:
        while not await store.exists(layout.result(1, "rollout")):
            for index in range(workers):
                if index not in lives or lives[index].returncode is not None:
                    lives[index] = await start(ground, run, index)
            # Early kills hit the start of a worker, later ones hit rollouts, records and the closing of the round.
            await asyncio.sleep(rng.uniform(0.5, 5.0))
            now = await finished_objects()
            assert seen.items() <= now.items(), "a finished rollout was lost or written again"
            seen = now
            victim = rng.randrange(workers)
            if lives[victim].returncode is None:
                lives[victim].kill()
                await lives[victim].communicate()
                kills += 1
        for worker in lives.values():
            await asyncio.wait_for(worker.communicate(), 120)
    finally:
        for worker in lives.values():
            if worker.returncode is None:
                worker.kill()
                await worker.communicate()
    disturbed = await read_manifest(store, 1)
    assert kills >= 3, "the round was over before it was disturbed"
    assert disturbed is not None and undisturbed is not None
    assert _what_counts(disturbed) == _what_counts(undisturbed)
    ended = await trajectories(store)
    assert Counter(t.rollout_id for t in ended) == Counter({t.rollout_id: 1 for t in ended}) and len(ended) == count
    assert (await _result(store)).summary.data_digest == undisturbed.data_digest


def _what_counts(manifest: RoundManifest) -> tuple[Any, ...]:
    return manifest.data_digest, manifest.rollouts, manifest.turns, manifest.labels, manifest.excluded, manifest.shards
