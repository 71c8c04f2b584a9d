"""What a dashboard is made of: rows of panels, each with its PromQL by legend."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["short", "percentunit", "s", "reqps", "ops", "none", "h"]


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    queries: Mapping[str, str]
    """PromQL by legend; `{{label}}` in a legend is the label's value."""
    unit: Unit = "short"
    """Of the values, by Grafana's names: `s` seconds, `percentunit` 0 to 1, `h` hours."""
    help: str = ""
    width: int = 8
    """Of 24."""


@dataclass(frozen=True, kw_only=True)
class Graph(Panel):
    """Over time."""

    stacked: bool = False


@dataclass(frozen=True, kw_only=True)
class Number(Panel):
    """The last value of each query."""

    width: int = 4


@dataclass(frozen=True, kw_only=True)
class Table(Panel):
    """The labels of what stands now, a row for each series."""

    columns: tuple[str, ...] = ()
    width: int = 24


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Choice:
    """A variable of the dashboard: `$name` in queries is one value of a label, all of them, or several."""

    name: str
    label: str
    query: str


@dataclass(frozen=True, kw_only=True)
class Board:
    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]
    choices: tuple[Choice, ...] = field(default=())


def quantiles(histogram: str, by: str = "", where: str = "", *, of: tuple[float, ...] = (0.5, 0.95)) -> dict[str, str]:
    """Quantiles of a histogram over what the graph's resolution calls a moment; `by`: labels to tell apart."""
    labels = ", ".join(filter(None, ("le", by)))
    legend = "".join(f"{{{{{label}}}}} " for label in by.split(", ") if label)
    rate = f"rate({histogram}_bucket{{{where}}}[$__rate_interval])"
    return {f"{legend}p{100 * one:.0f}": f"histogram_quantile({one}, sum by ({labels}) ({rate}))" for one in of}


def share(part: str, whole: str) -> str:
    """Of two sums; nothing where the whole is 0, for 0 of 0 is no number."""
    return f"{part} / ({whole} > 0)"
