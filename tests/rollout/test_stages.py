"""The stages as a runtime starts them: from the environment to a result in the store."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from dagger_operator.api import Role
from dagger_operator.evaluation.stage import evaluate
from dagger_operator.rollout.round import rollout
from dagger_operator.sandbox import isolation
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import read_manifest, training_set
from dagger_operator.store.records import LabelFlaw, Outcome, Trajectory, labelled_states
from dagger_operator.store.results import EvaluationResult, RolloutResult, read_result
from dagger_operator.store.stage import StageFailure
from dagger_operator.store.trajectories import finished, write_trajectory
from rollout.gathered import result_of, trajectories


async def test_a_round_goes_from_tasks_to_labels_that_train(ground: Any) -> None:
    run = ground.run(train=6)
    await rollout(ground.stage(run))
    store = ground.store(run)
    result = await read_result(store, 1, RolloutResult)
    assert result is not None
    summary = result.summary
    assert (summary.rollouts, summary.label_coverage, summary.nominal_beta, result.excluded) == (6, 1.0, 0.4, {})
    ended = await trajectories(store)
    turns = [turn for trajectory in ended for turn in trajectory.turns]
    assert summary.turns == len(turns) == summary.labels
    assert 0.0 < summary.teacher_turn_share == sum(turn.actor is Role.TEACHER for turn in turns) / len(turns) < 1.0
    assert summary.agreement is not None and 0.0 < summary.agreement < 1.0
    assert all((turn.coin < turn.beta) == (turn.actor is Role.TEACHER) for turn in turns)
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
    result = await read_result(ground.store(run), 1, EvaluationResult)
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


async def test_the_initial_student_is_evaluated_as_round_0_on_the_tasks_of_every_other_evaluation(ground: Any) -> None:
    run = ground.run(held_out=3)
    await evaluate(ground.stage(run, kind="evaluation", round_number=0))
    await evaluate(ground.stage(run, kind="evaluation"))
    initial, later = [await read_result(ground.store(run), number, EvaluationResult) for number in (0, 1)]
    assert initial is not None and later is not None
    tasks = [sorted((*one.resolved_tasks, *one.unresolved_tasks)) for one in (initial, later)]
    assert tasks[0] == tasks[1] and len(tasks[0]) == 3


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
    result = await result_of(ground.store(run(4096)))
    assert (result.summary.rollouts, result.summary.label_coverage, result.excluded) == (3, 1.0, {})
    assert all("right 1" in str(messages) for _, messages, _ in ground.policies.requests), "whole rollouts were made again"
    assert {t.tries for t in await trajectories(ground.store(run(4096)))} == {1}


async def test_a_gate_that_was_made_stricter_forgets_nothing_of_a_closed_round(ground: Any) -> None:
    run = ground.run(train=3, rollouts={"concurrency": 2, "leaseSeconds": 4, "infrastructureRetries": 0, "minValidFraction": 0.5})
    ground.policies.fault = lambda model, messages: web.Response(text="no json") if "right 1" in str(messages) else None
    await rollout(ground.stage(run))
    store, result = ground.store(run), await result_of(ground.store(run))
    await store.delete(layout.result(1, "rollout"))  # as if who closed it had died before it said so
    await rollout(ground.stage(ground.run(train=3, rollouts={"concurrency": 2, "leaseSeconds": 4, "minValidFraction": 1.0})))
    assert await result_of(store) == result and len(await finished(store, 1, Kind.ROLLOUT)) == 3


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
    assert (await result_of(ground.store(run))).summary.rollouts == 1
