"""Lower and upper bounds for the figures of `training.py`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Rows = Sequence[Mapping[str, float | str]]


@dataclass(frozen=True)
class Goal:
    tables: str
    """Prefix of the titles of the tables to which it applies."""
    figure: str
    rows: Mapping[float | str, float]
    """Minimum of the figure, by the first cell of its row."""
    most: bool = False
    """Whether it is a maximum instead."""

    def missed(self, table: Rows) -> Iterator[str]:
        for row in table:
            name, (first, *_) = next(iter(row)), row.values()
            if (goal := self.rows.get(first)) is None:
                continue
            found = float(row[self.figure])
            if not (found <= goal if self.most else found >= goal):
                yield f"{name} {first}: {self.figure} is {found:.3g}, not {goal:g} or {'less' if self.most else 'more'}"


TURNS = (4, 8, 16, 32)
GOALS = (
    Goal("time, 100 turns", "time ratio", dict(zip(TURNS, (2.0, 4.0, 7.0, 10.0), strict=True))),
    Goal("time, ", "share of the token ratio", dict.fromkeys(TURNS, 0.7)),
    Goal("memory, ", "by all logits", {"trees": 0.8, "head": 0.8}, most=True),
    Goal("memory, ", "by no checkpointing", {"checkpointing": 0.75}, most=True),
)


def missed(figures: Mapping[str, Rows]) -> list[str]:
    """Return a line for each missed goal; tables are given by title."""
    return [
        f"MISSED: {title}: {line}"
        for title, table in figures.items()
        for goal in GOALS
        if title.startswith(goal.tables)
        for line in goal.missed(table)
    ]
