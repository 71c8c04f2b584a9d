"""The rollout stage of a round: work until all of its rollouts are finished, then close it."""

import asyncio

import structlog

from dagger_operator.api import MixingStrategy
from dagger_operator.rollout.actions import ActionReader, action_reader
from dagger_operator.rollout.gate import counted, covered
from dagger_operator.rollout.worker import Job, work
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import close_round
from dagger_operator.store.results import RolloutResult, read_result, save_result
from dagger_operator.store.stage import Stage, StageFailure
from dagger_operator.tasks.deal import Assignment, deal
from dagger_operator.tasks.sources import load_training

log = structlog.get_logger(__name__)
STAGE = RolloutResult.stage


async def rollout(stage: Stage) -> None:
    """Return when the round's result exists. Raises `StageFailure`, `StoreUnavailable`, `DamagedObject`."""
    spec = stage.run.spec
    if await read_result(stage.store, stage.round, RolloutResult) is not None:
        return
    reader = action_reader(spec.scaffold)
    tasks = await load_training(spec.tasks, stage.store, stage.environ)
    assignments = deal(tasks, spec.tasks, seed=spec.seed, round=stage.round)
    await work(stage, Job(Kind.ROLLOUT, assignments, spec.mixing, spec.scaffold.max_turns), reader)
    if not await closed_by_first_worker(stage, STAGE):
        await _close(stage, assignments, reader)


async def closed_by_first_worker(stage: Stage, name: str) -> bool:
    """Whether worker 0 closed the stage. Other workers wait one lease for it, then close too, with the same result."""
    for _ in range(2 * stage.run.spec.rollouts.lease_seconds if stage.index else 0):
        if await stage.store.exists(layout.result(stage.round, name)):
            return True
        await asyncio.sleep(0.5)
    return False


async def _close(stage: Stage, assignments: tuple[Assignment, ...], reader: ActionReader) -> None:
    tally, _ = await counted(stage, Kind.ROLLOUT, assignments, reader)
    await covered(stage, tally)
    ids = [assignment.rollout_id for assignment in assignments]
    manifest = await close_round(stage.store, stage.run.metadata.name, stage.round, ids)
    if manifest is None:
        raise StageFailure("RoundNotFinished", "rollouts went missing while the round was closed; start the stage again", permanent=False)
    mixing = stage.run.spec.mixing
    summary = tally.summary(
        nominal_beta=mixing.beta_at(stage.round) if mixing.strategy is MixingStrategy.PER_TURN else None,
        data_digest=manifest.data_digest,
    )
    result = RolloutResult(summary=summary, manifest_digest=manifest.digest, excluded=manifest.excluded)
    await save_result(stage.store, stage.round, result)
    log.info("round closed", rollouts=summary.rollouts, labels=summary.labels, data=manifest.data_digest[:12])
