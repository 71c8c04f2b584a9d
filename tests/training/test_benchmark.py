"""The benchmark of training holds what it measures to its goals."""

import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Figures = dict[str, list[dict[str, Any]]]
NARROW, SHORT, MEMORY = "time, 100 turns, narrow, the teacher acts on 0% of turns", "time, 50 turns, narrow", "memory, wide"


@pytest.fixture(scope="module")
def missed() -> Callable[[Figures], list[str]]:
    found: Callable[[Figures], list[str]] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/training_goals.py"))["missed"]
    return found


def measured() -> Figures:
    """All goals are met, barely."""
    times = [
        {"turns": turns, "time ratio": ratio, "share of the token ratio": 0.7}
        for turns, ratio in zip((4, 8, 16, 32), (2, 4, 7, 10), strict=True)
    ]
    memory = [
        {"variant": "trees", "by all logits": 0.8, "by no checkpointing": ""},
        {"variant": "all logits", "by all logits": "", "by no checkpointing": ""},
        {"variant": "checkpointing", "by all logits": 0.81, "by no checkpointing": 0.75},
        {"variant": "head", "by all logits": 0.3, "by no checkpointing": ""},
    ]
    short = [{**row, "time ratio": 1.9} for row in times]
    return {NARROW: times, SHORT: short, MEMORY: memory, "resume, wide": [{"store s": 2.5}]}


def test_goals_that_are_met_say_nothing(missed: Callable[[Figures], list[str]]) -> None:
    assert missed(measured()) == []


@pytest.mark.parametrize(
    ("title", "row", "figure", "found", "said"),
    [
        (NARROW, 1, "time ratio", 3.9, "turns 8: time ratio is 3.9, not 4 or more"),
        (NARROW, 3, "share of the token ratio", 0.69, "turns 32: share of the token ratio is 0.69, not 0.7 or more"),
        (SHORT, 0, "share of the token ratio", math.nan, "turns 4: share of the token ratio is nan, not 0.7 or more"),
        (MEMORY, 0, "by all logits", 0.82, "variant trees: by all logits is 0.82, not 0.8 or less"),
        (MEMORY, 2, "by no checkpointing", 0.76, "variant checkpointing: by no checkpointing is 0.76, not 0.75 or less"),
    ],
)
def test_each_goal_that_is_missed_has_a_line(
    missed: Callable[[Figures], list[str]], title: str, row: int, figure: str, found: float, said: str
) -> None:
    figures = measured()
    figures[title][row][figure] = found
    assert missed(figures) == [f"MISSED: {title}: {said}"]
