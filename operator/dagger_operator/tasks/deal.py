"""Selects the tasks of each round: a seeded shuffle, dealt out over the rounds, permanently reproducible.

Orders come from SHA-256 of seed and task id, not from a library's random numbers and not from the order of a file: the same
tasks with the same seed are dealt identically on every machine and in every version.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from dagger_operator.api import HeldOut, Tasks
from dagger_operator.store.stage import StageFailure
from dagger_operator.tasks.task import Task


@dataclass(frozen=True)
class Assignment:
    """One rollout to perform."""

    rollout_id: str
    """Unique within a round and kind, and a valid object name: `t00017-a0` is the round's 18th task, first attempt."""
    ordinal: int
    """Position among the round's rollouts, from 0."""
    task: Task
    attempt: int
    """Which of the task's `rolloutsPerTask` attempts this is, from 0."""


def deal(tasks: Sequence[Task], spec: Tasks, *, seed: int, round: int) -> tuple[Assignment, ...]:
    """Return the rollouts of a round, counted from 1.

    Over the rounds no task comes twice before all have come once, none a third time before all have come twice, and so on; within a
    round none comes twice unless the round is larger than the set.
    """
    if not tasks:
        raise StageFailure("NoTasks", "spec.tasks.source holds no tasks: name a source with rows, or another split")
    waiting: list[Task] = []
    dealt: list[Task] = []
    shuffles = 0
    for number in range(1, round + 1):
        dealt = []
        for _ in range(spec.count_at(number)):
            if not waiting:
                waiting = _shuffled(tasks, f"{seed}/deal/{shuffles}")
                # Tasks that this round already has go to the end of a new shuffle: the round's tasks stay distinct.
                had = {task.id for task in dealt}
                waiting.sort(key=lambda task: task.id in had)
                shuffles += 1
            dealt.append(waiting.pop(0))
    return _assignments(dealt, spec.rollouts_per_task)


def held_out(tasks: Sequence[Task], spec: HeldOut, *, seed: int) -> tuple[Assignment, ...]:
    """Return the evaluation's rollouts, the same for every round: `count` tasks of a seeded shuffle, or all."""
    return _assignments(_shuffled(tasks, f"{seed}/held-out")[: held_out_count(tasks, spec)], 1)


def held_out_count(tasks: Sequence[Task], spec: HeldOut) -> int:
    """Return the number of held-out tasks. Raises `StageFailure` if `spec` requests more than there are."""
    count = len(tasks) if spec.count is None else spec.count
    if not 0 < count <= len(tasks):
        raise StageFailure("TooFewTasks", f"spec.tasks.heldOut.count is {count} and its source has {len(tasks)}: lower it or add tasks")
    return count


def _shuffled(tasks: Sequence[Task], salt: str) -> list[Task]:
    return sorted(tasks, key=lambda task: sha256(f"{salt}/{task.id}".encode()).digest())


def _assignments(tasks: Sequence[Task], attempts: int) -> tuple[Assignment, ...]:
    return tuple(
        Assignment(f"t{index:05d}-a{attempt}", index * attempts + attempt, task, attempt)
        for index, task in enumerate(tasks)
        for attempt in range(attempts)
    )
