"""The figures as a table, and against the ranges that earlier series gave."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Figures = dict[str, float]


def table(measured: Sequence[Figures]) -> str:
    """In Markdown: a row for each figure, a column for each number of runs, and how the figure grows."""
    sizes = " | ".join(f"{one['runs']:.0f} runs" for one in measured)
    lines = [f"| figure | {sizes} | slope |", f"|---|{'---|' * (len(measured) + 1)}"]
    for figure in measured[-1] if measured else ():
        if figure != "runs":
            grows = slope(measured, figure)
            cells = [f"{one.get(figure, math.nan):.4g}" for one in measured]
            lines.append(f"| {figure} | {' | '.join(cells)} | {'' if grows is None else f'{grows:.2f}'} |")
    return "\n".join(lines)


def slope(measured: Sequence[Figures], figure: str) -> float | None:
    """Of the logarithm of a figure over that of the number of runs, by least squares: 1 is linear. None with fewer than three points."""
    points = [(math.log(one["runs"]), math.log(one[figure])) for one in measured if one.get(figure, 0) > 0]
    if len(points) < 3:
        return None
    x0, y0 = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)


def judged(measured: Sequence[Figures], ranges: Path) -> tuple[str, bool]:
    """A line for each range that these sizes tell something about, and whether all are kept."""
    held = yaml.safe_load(ranges.read_text())
    lines, kept = [], True
    checks: list[tuple[dict[str, Any], str, float | None]] = [
        (bound, f"{bound['figure']} at {one['runs']:.0f} runs", one.get(bound["figure"]))
        for bound in held["figures"]
        for one in measured
        if one["runs"] <= bound["upTo"]
    ]
    checks += [(bound, f"slope of {bound['figure']}", slope(measured, bound["figure"])) for bound in held["slopes"]]
    for bound, what, found in checks:
        if found is None:
            continue
        low, high = bound.get("least", -math.inf), bound.get("most", math.inf)
        if not low <= found <= high:
            kept = False
            lines.append(f"OUT OF RANGE: {what} is {found:.4g}, not {low:g} to {high:g}")
    told = sum(found is not None for _, _, found in checks)
    return "\n".join([*lines, f"{told - len(lines)} of {told} figures are within {ranges.name}"]), kept
