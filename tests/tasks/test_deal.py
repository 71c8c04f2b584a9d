"""Dealing: deterministic for ever, and fair over rounds."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagger_operator.api import HeldOut, Tasks, TaskSource
from dagger_operator.store.stage import StageFailure
from dagger_operator.tasks.deal import deal, held_out
from dagger_operator.tasks.task import ScriptGrading, Task

SOURCE = {"type": "JSONL", "uri": "tasks.jsonl"}

GOLDEN = [["task-5", "task-0"], ["task-4", "task-1", "task-6"], ["task-3", "task-2", "task-4"], ["task-1", "task-0", "task-6"]]
GOLDEN_HELD_OUT = ["task-0", "task-4", "task-1"]


def make(count: int) -> list[Task]:
    return [Task(id=f"task-{number}", statement="", grading=ScriptGrading(command="true")) for number in range(count)]


def spec(per_round: int, first_round: int | None = None, attempts: int = 1) -> Tasks:
    return Tasks(
        source=TaskSource.model_validate(SOURCE),
        per_round=per_round,
        first_round=first_round,
        rollouts_per_task=attempts,
        held_out=HeldOut(source=TaskSource.model_validate(SOURCE)),
    )


def test_a_deal_is_the_same_for_ever() -> None:
    """Golden: finished rounds of existing runs depend on it."""
    dealt = [[a.task.id for a in deal(make(7), spec(3, first_round=2), seed=11, round=number)] for number in (1, 2, 3, 4)]
    assert dealt == GOLDEN
    assert [a.task.id for a in held_out(make(7), HeldOut(source=TaskSource.model_validate(SOURCE), count=3), seed=11)] == GOLDEN_HELD_OUT


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 25),
    per_round=st.integers(1, 40),
    first_round=st.none() | st.integers(1, 40),
    attempts=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_no_task_comes_again_before_all_came(
    count: int, per_round: int, first_round: int | None, attempts: int, seed: int, data: st.DataObject
) -> None:
    tasks, rules = make(count), spec(per_round, first_round, attempts)
    came: Counter[str] = Counter({task.id: 0 for task in tasks})
    for number in range(1, 6):
        dealt = deal(tasks, rules, seed=seed, round=number)
        assert len(dealt) == rules.count_at(number) * attempts
        assert [a.ordinal for a in dealt] == list(range(len(dealt)))
        assert len({a.rollout_id for a in dealt}) == len(dealt)
        for first in dealt[::attempts]:
            came[first.task.id] += 1
            assert max(came.values()) - min(came.values()) <= 1
        for position, assignment in enumerate(dealt):
            assert (assignment.task, assignment.attempt) == (dealt[position - position % attempts].task, position % attempts)
            assert assignment.rollout_id == f"t{position // attempts:05d}-a{assignment.attempt}"
        if rules.count_at(number) <= count:
            assert len({a.task.id for a in dealt}) == rules.count_at(number)
        shuffled = data.draw(st.permutations(tasks))
        assert deal(shuffled, rules, seed=seed, round=number) == dealt


def test_seeds_and_rounds_deal_differently() -> None:
    tasks = make(50)
    deals = [tuple(a.task.id for a in deal(tasks, spec(25), seed=seed, round=number)) for seed in (1, 2) for number in (1, 2, 3)]
    assert len(set(deals)) == 6


@given(count=st.integers(1, 30), seed=st.integers(0, 2**32), data=st.data())
def test_held_out_tasks_are_the_first_of_one_order(count: int, seed: int, data: st.DataObject) -> None:
    tasks = make(count)
    whole = held_out(tasks, spec(1).held_out, seed=seed)
    assert sorted(a.task.id for a in whole) == sorted(task.id for task in tasks)
    some = data.draw(st.integers(1, count))
    few = HeldOut(source=TaskSource.model_validate(SOURCE), count=some)
    assert held_out(data.draw(st.permutations(tasks)), few, seed=seed) == whole[:some]


def test_too_few_tasks_say_what_to_do() -> None:
    with pytest.raises(StageFailure, match=r"NoTasks.*another split"):
        deal([], spec(1), seed=0, round=1)
    with pytest.raises(StageFailure, match=r"TooFewTasks.*count is 4.*has 3.*lower it"):
        held_out(make(3), HeldOut(source=TaskSource.model_validate(SOURCE), count=4), seed=0)
