"""The evaluation stage of a round: the student that the round made, alone and greedy, on the held-out tasks."""

import structlog

from dagger_operator.evaluation.summary import evaluation_result
from dagger_operator.rollout.actions import action_reader
from dagger_operator.rollout.gate import counted
from dagger_operator.rollout.round import closed_by_first_worker
from dagger_operator.rollout.worker import Job, work
from dagger_operator.store.layout import Kind
from dagger_operator.store.results import EvaluationResult, read_result, save_result
from dagger_operator.store.stage import Stage
from dagger_operator.tasks.deal import held_out
from dagger_operator.tasks.sources import load_held_out

log = structlog.get_logger(__name__)
STAGE = EvaluationResult.stage


async def evaluate(stage: Stage) -> None:
    """Run until the round's evaluation exists. Raises `StageFailure`, `StoreUnavailable`, `DamagedObject`."""
    spec = stage.run.spec
    if await read_result(stage.store, stage.round, EvaluationResult) is not None:
        return
    reader = action_reader(spec.scaffold)
    tasks = await load_held_out(spec.tasks, stage.store, stage.environ)
    assignments = held_out(tasks, spec.tasks.held_out, seed=spec.seed)
    max_turns = spec.evaluation.max_turns or spec.scaffold.max_turns
    await work(stage, Job(Kind.EVALUATION, assignments, None, max_turns), reader)
    if await closed_by_first_worker(stage, STAGE):
        return
    tally, trajectories = await counted(stage, Kind.EVALUATION, assignments, reader)
    result = evaluation_result(stage.policy, trajectories, confidence=spec.evaluation.confidence, seconds=tally.seconds)
    await save_result(stage.store, stage.round, result)
    log.info("evaluated", policy=stage.policy, tasks=result.summary.tasks, resolved=result.summary.resolved)
