"""The dashboards that the chart brings: made from code, over metrics that exist, in PromQL that Prometheus takes."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.drawing import drawn
from dashboards.fleet import FLEET
from dashboards.parts import Board
from dashboards.run import RUN
from fixtures.metrics import PROMETHEUS_ADDS, queries
from fixtures.tools import ROOT

BOARDS = pytest.mark.parametrize("board", [FLEET, RUN], ids=lambda board: board.uid)


@BOARDS
def test_the_charts_file_is_what_the_code_draws(board: Board) -> None:
    made = ROOT / f"helm/dagger-operator/files/dashboards/{board.uid}.json"
    assert made.read_text() == drawn(board), "run `make generate`"


@BOARDS
def test_grafana_finds_every_panel_in_a_place_of_its_own_with_a_source(board: Board) -> None:
    panels = json.loads(drawn(board))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [cell for panel in panels for cell in _cells(panel["gridPos"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {"${datasource}"}
    assert [one["name"] for one in json.loads(drawn(board))["templating"]["list"]] == ["datasource", *(one.name for one in board.choices)]


@BOARDS
def test_a_panel_rests_on_documented_metrics_and_labels(board: Board, documented_metrics: Any) -> None:
    known = {name: row for section, table in documented_metrics.tables.items() if section != "Alerts" for name, row in table.items()}
    for title, query in queries(board):
        uses = re.findall(r"\b((?:dagger|workqueue|rest_client)_(?!operator_dev)\w+)(?:\{([^}]*)\})?", query)
        assert uses, title
        labels = set[str]()
        for name, matchers in uses:
            histogram = re.sub(r"_(bucket|count)$", "", name)
            kind, own = known.get(name) or known[histogram]
            assert (name != histogram) == (kind == "histogram"), f"{title}: {name} is a {kind}"
            assert (kind == "gauge") != bool(re.search(rf"(rate|increase)\({name}", query)), f"{title}: {name} is a {kind}"
            labels |= own.keys()
            for label, values in re.findall(r'(\w+)!?=~?"([^"]*)"', matchers):
                closed = own[label] if label not in PROMETHEUS_ADDS else None
                assert closed is None or set(values.split("|")) <= closed | {""}, f"{title}: no {label} is {values}"
        for by in re.findall(r"by \(([^)]*)\)", query):
            assert set(by.split(", ")) <= labels | PROMETHEUS_ADDS | {"le"}, f"{title}: by {by}"


def test_every_metric_is_on_a_dashboard(documented_metrics: Any) -> None:
    """What nobody draws nobody looks at: a new metric gets its place, or a reason here."""
    drawn_ones = " ".join(query for board in (FLEET, RUN) for _, query in queries(board))
    known = {name for section, table in documented_metrics.tables.items() if section != "Alerts" for name in table}
    without = {name for name in known if not re.search(rf"\b{name}\b|\b{name}_(bucket|count)\b", drawn_ones)}
    assert without == {"dagger_operator_build_info"}  # its version is a label of no graph


def test_operators_of_several_releases_are_not_counted_as_one() -> None:
    drawn_ones = [query for _, query in queries(FLEET) if "dagger_operator_leading" in query]
    assert drawn_ones == ["sum by (namespace) (dagger_operator_leading)"]


def test_how_long_a_rollout_takes_is_drawn_without_the_tries_that_infrastructure_broke() -> None:
    drawn_ones = [query for _, query in queries(RUN) if "dagger_rollout_seconds_bucket" in query]
    assert drawn_ones and all('outcome="Done"' in query for query in drawn_ones)


@pytest.mark.heavy
def test_prometheus_takes_every_query(prometheus_programs: Path, tmp_path: Path) -> None:
    rules = [{"record": f"a:b:{number}", "expr": query} for number, (_, query) in enumerate([*queries(FLEET), *queries(RUN)])]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    done = subprocess.run(
        [prometheus_programs / "promtool", "check", "rules", file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout


def _cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        yield from ((x, y) for y in range(place["y"], place["y"] + place["h"]))
