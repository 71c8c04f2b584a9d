"""The benchmark of many runs holds what it measures to its ranges, and says what it could not."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Figures = dict[str, float]
Judged = Callable[[list[Figures], Path], tuple[str, bool]]
RANGES = """
figures:
  - {figure: memory MiB, upTo: 200, most: 200}
  - {figure: memory MiB, upTo: 1000, most: 300}
  - {figure: applies per child, upTo: 1000, least: 1, most: 1.01}
slopes:
  - {figure: burst cpu seconds, most: 1.1}
"""


@pytest.fixture(scope="module")
def judged() -> Judged:
    found: Judged = runpy.run_path(str(BENCHMARKS / "scale_ranges.py"))["judged"]
    return found


@pytest.fixture
def ranges(tmp_path: Path) -> Path:
    path = tmp_path / "ranges.yaml"
    path.write_text(RANGES)
    return path


def measured(*sizes: int) -> list[Figures]:
    """All ranges are kept, barely."""
    return [
        {"runs": size, "memory MiB": 200 if size <= 200 else 300, "applies per child": 1, "burst cpu seconds": size**1.09} for size in sizes
    ]


def test_ranges_that_are_kept_are_counted(judged: Judged, ranges: Path) -> None:
    assert judged(measured(50, 200, 1000), ranges) == ("9 of 9 figures are within ranges.yaml", True)


@pytest.mark.parametrize(
    ("size", "figure", "found", "said"),
    [
        (1, "memory MiB", 201, "memory MiB at 200 runs is 201, not -inf to 200"),
        (2, "memory MiB", 301, "memory MiB at 1000 runs is 301, not -inf to 300"),
        (0, "applies per child", 0.99, "applies per child at 50 runs is 0.99, not 1 to 1.01"),
        (2, "applies per child", 1.02, "applies per child at 1000 runs is 1.02, not 1 to 1.01"),
        (2, "burst cpu seconds", 2500.0, "slope of burst cpu seconds is 1.191, not -inf to 1.1"),
    ],
)
def test_each_range_that_is_broken_has_a_line(judged: Judged, ranges: Path, size: int, figure: str, found: float, said: str) -> None:
    figures = measured(50, 200, 1000)
    figures[size][figure] = found
    verdict, kept = judged(figures, ranges)
    assert verdict.splitlines() == [f"OUT OF RANGE: {said}", "8 of 9 figures are within ranges.yaml"]
    assert not kept


def test_a_size_is_not_held_to_the_bound_of_smaller_ones(judged: Judged, ranges: Path) -> None:
    verdict, kept = judged(measured(400, 600, 1000), ranges)
    assert kept, verdict


@pytest.mark.parametrize("figure", ["applies per child", "burst cpu seconds"])
def test_a_figure_that_nothing_measures_fails(judged: Judged, ranges: Path, figure: str) -> None:
    figures = measured(50, 200, 1000)
    for one in figures:
        del one[figure]
    verdict, kept = judged(figures, ranges)
    assert not kept
    assert verdict.splitlines()[0] == f"NOT MEASURED: {figure} has a range in ranges.yaml, and no measurement has it"
    assert not judged([], ranges)[1]


def test_a_slope_that_too_few_sizes_give_is_named_as_not_checked(judged: Judged, ranges: Path) -> None:
    verdict, kept = judged(measured(200, 1000), ranges)
    assert kept
    assert verdict.splitlines()[0] == "not checked, because it takes three sizes: slope of burst cpu seconds"


def test_every_figure_with_a_range_is_one_that_the_benchmark_measures() -> None:
    names = set(re.findall(r'f?"((?:{name} )?[\w ]+)": ', (BENCHMARKS / "scale.py").read_text()))
    phases = {name.replace("{name}", phase) for name in names for phase in ("burst", "steady", "moving")}
    held = yaml.safe_load((BENCHMARKS / "scale.ranges.yaml").read_text())
    assert {bound["figure"] for bound in (*held["figures"], *held["slopes"])} <= phases
