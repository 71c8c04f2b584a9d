"""When a stage's rollouts are good enough to go on with, and what becomes of those that infrastructure broke."""

import asyncio

from dagger_operator.rollout.actions import ActionReader
from dagger_operator.rollout.summary import Tally
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.records import Outcome, Trajectory
from dagger_operator.store.stage import Stage, StageFailure
from dagger_operator.store.trajectories import read_trajectories
from dagger_operator.tasks.deal import Assignment


async def counted(stage: Stage, kind: Kind, assignments: tuple[Assignment, ...], reader: ActionReader) -> tuple[Tally, list[Trajectory]]:
    """Counts a stage's finished rollouts; of the trajectories returned, turns are left out to save memory.

    Raises `StageFailure` where infrastructure broke more of them than `rollouts.minValidFraction` allows. Those are then forgotten,
    so that they are tried again when the run is resumed: what was wrong with the infrastructure may be mended by then.
    """
    tally, trajectories = Tally(reader), list[Trajectory]()
    ids = [assignment.rollout_id for assignment in assignments]
    async for trajectory in read_trajectories(stage.store, stage.round, kind, rollout_ids=ids):
        tally.add(trajectory)
        trajectories.append(trajectory.model_copy(update={"turns": ()}))
    least = stage.run.spec.rollouts.min_valid_fraction
    if tally.valid_fraction < least:
        broken = [t.rollout_id for t in trajectories if t.outcome is Outcome.INFRASTRUCTURE_FAILURE]
        causes = ", ".join(f"{count} {reason}" for reason, count in tally.excluded.most_common())
        example = next(t.failure.message for t in trajectories if t.failure is not None and t.rollout_id == broken[0])
        await asyncio.gather(*(stage.store.delete(layout.trajectory(stage.round, kind, each)) for each in broken))
        raise StageFailure(
            "TooFewValidRollouts",
            f"infrastructure broke {len(broken)} of {tally.rollouts} rollouts ({causes}; such as: {example}), and "
            f"rollouts.minValidFraction asks for {least:g} whole. Mend the cause, then resume the run: only those are run again",
        )
    return tally, trajectories
