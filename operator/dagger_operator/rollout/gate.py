"""When a stage's rollouts are good enough to go on with, and what becomes of those that are not.

A rollout is finished for as long as its trajectory is there, and a gate that fails takes trajectories away again. What there is of a
stage, in the order in which it comes to be:

| object     | made                                         | removed                                                              |
|------------|----------------------------------------------|----------------------------------------------------------------------|
| claim      | by who takes the rollout, before the try     | once the trajectory is there, by its holder or who takes it next     |
| trajectory | once, by the holder, when the try has ended  | by a gate that fails, never after the manifest                       |
| manifest   | of a round, once, by who closes it, after    | never: what it counts has passed the gates for good, whatever is     |
|            | both gates                                   | edited later                                                         |
| result     | once, last                                   | never                                                                |

So nothing rests yet on what a gate removes. Three things follow from who else is about meanwhile:
- A claim is not forgotten with its trajectory. One that is still there, since its holder died between the two, goes on with its counts.
- A worker that still sweeps finds what was forgotten open, and may begin it before its pod is ended. What it finishes counts at the resume.
- A worker that counts at the same moment misses what was forgotten, and ends as `DamagedObject`, whose remedy is to start again, too.
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
    """Counts a stage's finished rollouts; of the trajectories returned, turns are left out to save memory.

    Raises `StageFailure` where one is of another task than is dealt to it, or where infrastructure broke more of them than
    `rollouts.minValidFraction` allows. Those are then forgotten, so that they are tried again when the run is resumed: what was wrong with
    the infrastructure may be mended by then.
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
            f"rollouts.minValidFraction asks for {least:g} whole. Mend the cause, then resume the run: only those are run again",
        )
    return tally, trajectories


async def covered(stage: Stage, tally: Tally) -> None:
    """Raises `StageFailure` where too few of the visited states have a label that can be trained on.

    Rollouts whose labels an edit of the run may mend are then forgotten, so that they are made again when the run is resumed. What is
    drawn from the seed does not change: where the teacher is sampled by seed, too, the round is the one that the edited run would have
    made from the start.
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
        f"Mend that, or lower labels.minCoverage, then resume the run: {len(tally.mendable)} of {tally.rollouts} rollouts are made again",
    )


async def _closed(stage: Stage, kind: Kind) -> bool:
    return kind is Kind.ROLLOUT and await stage.store.exists(layout.manifest(stage.round))


async def _forget(stage: Stage, kind: Kind, rollout_ids: Iterable[str]) -> None:
    await asyncio.gather(*(stage.store.delete(layout.trajectory(stage.round, kind, each)) for each in rollout_ids))
