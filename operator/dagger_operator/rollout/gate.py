"""Decides whether a stage's rollouts are good enough to continue, and what happens to those that are not.

A rollout is finished as long as its trajectory exists, and a failing gate deletes trajectories. The objects of a stage, in the order of
their creation:

| object     | created                                      | deleted                                                              |
|------------|----------------------------------------------|----------------------------------------------------------------------|
| claim      | by the worker that takes the rollout, before | once the trajectory exists, by its holder or by the next worker that |
|            | the try                                      | takes it                                                             |
| trajectory | once, by the holder, when the try has ended  | by a failing gate, never after the manifest                          |
| manifest   | once per round, by the worker that closes    | never: what it counts has passed the gates for good, whatever is     |
|            | it, after both gates                         | edited later                                                         |
| result     | once, last                                   | never                                                                |

So nothing depends yet on what a gate deletes. Other workers may be running at the same time, which has three consequences:
- A claim is not deleted with its trajectory. One that remains because its holder died between the two keeps its counts.
- A worker that is still sweeping sees the deleted rollouts as open and may start them before its pod ends. What it finishes counts after
  the resume.
- A worker that is counting at the same moment misses the deleted trajectories and fails with `DamagedObject`, whose remedy is also to
  start the stage again.
"""

import asyncio
from collections.abc import Iterable

from dagger_operator.rollout.actions import ActionReader
from dagger_operator.rollout.summary import Tally
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.records import LabelFlaw, Outcome, Trajectory
from dagger_operator.store.stage import Stage, StageFailure
from dagger_operator.store.trajectories import read_trajectories
from dagger_operator.tasks.deal import Assignment

_REMEDIES = {
    LabelFlaw.TRUNCATED: "raise teacher.sampling.maxTokens, or teacher.serving.maxModelLen where a state leaves less room than that",
    LabelFlaw.UNPARSABLE: "make a new run, whose templates and scaffold.protocol fit the teacher",
    LabelFlaw.REFUSED: "give the teacher the student's context, by teacher.serving.maxModelLen",
    LabelFlaw.REQUEST_FAILED: "raise labels.attempts, or lower labels.concurrency",
}


async def counted(stage: Stage, kind: Kind, assignments: tuple[Assignment, ...], reader: ActionReader) -> tuple[Tally, list[Trajectory]]:
    """Count a stage's finished rollouts; the returned trajectories have no turns, to save memory.

    Raises `StageFailure` if a trajectory is of another task than the one dealt to its rollout, or if infrastructure broke more rollouts
    than `rollouts.minValidFraction` allows. The broken ones are then deleted, so that they are tried again when the run is resumed: the
    infrastructure may be fixed by then.
    """
    tally, trajectories = Tally(reader), list[Trajectory]()
    dealt = {assignment.rollout_id: assignment.task.id for assignment in assignments}
    async for trajectory in read_trajectories(stage.store, stage.round, kind, rollout_ids=dealt):
        if trajectory.task_id != (task := dealt.get(trajectory.rollout_id)):
            raise StageFailure(
                "TasksChanged",
                f"{layout.trajectory(stage.round, kind, trajectory.rollout_id)} is of task {trajectory.task_id}, and that rollout is dealt "
                f"{task}: spec.tasks held other tasks when it was made. Delete such trajectories and resume the run, which makes them "
                "again, or make a new run with a new name",
            )
        tally.add(trajectory)
        trajectories.append(trajectory.model_copy(update={"turns": ()}))
    least = stage.run.spec.rollouts.min_valid_fraction
    if tally.valid_fraction < least and not await _closed(stage, kind):
        broken = [t.rollout_id for t in trajectories if t.outcome is Outcome.INFRASTRUCTURE_FAILURE]
        causes = ", ".join(f"{count} {reason}" for reason, count in tally.excluded.most_common())
        example = next(t.failure.message for t in trajectories if t.failure is not None and t.rollout_id == broken[0])
        await _forget(stage, kind, broken)
        raise StageFailure(
            "TooFewValidRollouts",
            f"infrastructure broke {len(broken)} of {tally.rollouts} rollouts ({causes}; such as: {example}), and "
            f"rollouts.minValidFraction asks for {least:g} whole. Fix the cause, then resume the run: only those are run again",
        )
    return tally, trajectories


async def covered(stage: Stage, tally: Tally) -> None:
    """Raise `StageFailure` if too few of the visited states have a label that can be trained on.

    Rollouts whose labels could be fixed by editing the run are then deleted, so that they are run again when the run is resumed. Draws
    from the seed do not change: if the teacher, too, is sampled by seed, the round is the one that the edited run would have produced
    from the start.
    """
    least = stage.run.spec.labels.min_coverage
    if (tally.turns and tally.coverage >= least) or await _closed(stage, Kind.ROLLOUT):
        return
    await _forget(stage, Kind.ROLLOUT, tally.mendable)
    flawed = [f"{count} {flaw.value} ({_REMEDIES[flaw]})" for flaw, count in tally.flaws.most_common()]
    flawed += [
        f"{count} {LabelFlaw.TRUNCATED.value} (the teacher's endpoint ended them as {reason}: look there, then make a new run)"
        for reason, count in tally.stopped.most_common()
    ]
    raise StageFailure(
        "LabelCoverageTooLow",
        f"{tally.labels} of {tally.turns} visited states have a label that can be trained on, and labels.minCoverage asks for {least:g}: "
        f"{', '.join(flawed) or 'no state was visited (a prompt has to fit the context of who acts first)'}. "
        f"Fix that, or lower labels.minCoverage, then resume the run: {len(tally.mendable)} of {tally.rollouts} rollouts are made again",
    )


async def _closed(stage: Stage, kind: Kind) -> bool:
    return kind is Kind.ROLLOUT and await stage.store.exists(layout.manifest(stage.round))


async def _forget(stage: Stage, kind: Kind, rollout_ids: Iterable[str]) -> None:
    await asyncio.gather(*(stage.store.delete(layout.trajectory(stage.round, kind, each)) for each in rollout_ids))
