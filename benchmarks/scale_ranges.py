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
    """Return a line for each violated range that applies to these sizes, with a summary, and whether all ranges are kept."""
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
