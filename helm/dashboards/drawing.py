"""Grafana's JSON of a board, by grafana-foundation-sdk."""

from itertools import count
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common as draw_common
from grafana_foundation_sdk.builders import dashboard as draw
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.parts import Board, Choice, Graph, Number, Panel, Table

SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = 8


def drawn(board: Board) -> str:
    """The board as Grafana imports it."""
    made = (
        draw.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["dagger-operator"])
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(
            draw.DashboardLink("DAgger")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["dagger-operator"])
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(draw.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for choice in board.choices:
        made = made.with_variable(_variable(choice))
    numbers = count(1)
    for row in board.rows:
        made = made.with_row(draw.Row(row.title).id(next(numbers)))
        for panel in row.panels:
            made = made.with_panel(_panel(panel, next(numbers)))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _variable(choice: Choice) -> draw.QueryVariable:
    return (
        draw.QueryVariable(choice.name)
        .label(choice.label)
        .datasource(SOURCE)
        .query({"query": choice.query, "refId": choice.name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")  # series without the label too: not every Prometheus gives pods' labels to their samples
        .current(dashboard.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel, number: int) -> Builder[dashboard.Panel]:
    made: stat.Panel | table.Panel | timeseries.Panel
    match panel:
        case Number():
            made = stat.Panel().height(HEIGHT // 2).color_mode(common.BigValueColorMode.NONE)
        case Table():
            made = table.Panel().height(HEIGHT).with_transformation(_columns(panel.columns))
        case Graph(stacked=stacked):
            made = timeseries.Panel().height(HEIGHT).fill_opacity(30 if stacked else 0).legend(_LEGEND).min(0)
            if stacked:
                made = made.stacking(draw_common.StackingConfig().mode(common.StackingMode.NORMAL))
        case _:
            raise TypeError(f"no panel: {panel}")
    made = made.id(number).title(panel.title).description(panel.help).unit(panel.unit).span(panel.width).datasource(SOURCE)
    for letter, (legend, expression) in zip(ascii_uppercase, panel.queries.items(), strict=False):
        query = prometheus.Dataquery().expr(expression).legend_format(legend or panel.title).ref_id(letter)
        made = made.with_target(query if isinstance(panel, Graph) else query.instant().format(_FORMATS[type(panel)]))
    return made


_LEGEND = (
    draw_common.VizLegendOptions().display_mode(common.LegendDisplayMode.LIST).placement(common.LegendPlacement.BOTTOM).show_legend(True)
)
_FORMATS = {Number: PromQueryFormat.TIME_SERIES, Table: PromQueryFormat.TABLE}


def _columns(names: tuple[str, ...]) -> dashboard.DataTransformerConfig:
    order = {name: position for position, name in enumerate(names)}
    return dashboard.DataTransformerConfig(
        id_val="organize", options={"excludeByName": {"Time": True, "Value": True}, "indexByName": order, "renameByName": {}}
    )
