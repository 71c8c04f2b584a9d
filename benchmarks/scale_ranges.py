"""Formats the figures as a table, and compares them with the ranges from earlier series."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Figures = dict[str, float]


def table(measured: Sequence[Figures]) -> str:
    """Return a Markdown table: a row per figure, a column per number of runs, and how the figure grows."""
    sizes = " | ".join(f"{one['runs']:.0f} runs" for one in measured)
    lines = [f"| figure | {sizes} | slope |", f"|---|{'---|' * (len(measured) + 1)}"]
    for figure in measured[-1] if measured else ():
        if figure != "runs":
            grows = slope(measured, figure)
            cells = [f"{one.get(figure, math.nan):.4g}" for one in measured]
            lines.append(f"| {figure} | {' | '.join(cells)} | {'' if grows is None else f'{grows:.2f}'} |")
    return "\n".join(lines)


def slope(measured: Sequence[Figures], figure: str) -> float | None:
    """Return the least-squares slope of log figure over log number of runs: 1 is linear. None with fewer than three points."""
    points = [(math.log(one["runs"]), math.log(one[figure])) for one in measured if one.get(figure, 0) > 0]
    if len(points) < 3:
        return None
    x0, y0 = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)


def judged(measured: Sequence[Figures], ranges: Path) -> tuple[str, bool]:
    """Return a line for each violated range that applies to these sizes, for each figure of the ranges that no measurement has, and for the
    slopes that need more sizes; with a summary, and whether all ranges are kept. A figure that is not measured keeps no range."""
    held = yaml.safe_load(ranges.read_text())
    named = dict.fromkeys(bound["figure"] for bound in (*held["figures"], *held["slopes"]))
    missing = [figure for figure in named if not any(figure in one for one in measured)]
    checks: list[tuple[dict[str, Any], str, float | None]] = [
        (bound, f"{bound['figure']} at {one['runs']:.0f} runs", one.get(bound["figure"]))
        for bound in held["figures"]
        for one in measured
        if one["runs"] <= bound["upTo"]
    ]
    slopes = [(bound, f"slope of {bound['figure']}", slope(measured, bound["figure"])) for bound in held["slopes"]]
    outside, told = [], 0
    for bound, what, found in [*checks, *slopes]:
        if found is None:
            continue
        told += 1
        low, high = bound.get("least", -math.inf), bound.get("most", math.inf)
        if not low <= found <= high:
            outside.append(f"OUT OF RANGE: {what} is {found:.4g}, not {low:g} to {high:g}")
    lines = [f"NOT MEASURED: {figure} has a range in {ranges.name}, and no measurement has it" for figure in missing] + outside
    if unknown := [what for bound, what, found in slopes if found is None and bound["figure"] not in missing]:
        lines.append(f"not checked, because it takes three sizes: {', '.join(unknown)}")
    return "\n".join([*lines, f"{told - len(outside)} of {told} figures are within {ranges.name}"]), not missing and not outside
