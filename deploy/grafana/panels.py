"""The kinds of panels of the dashboards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat, QueryEditorMode

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

COUNT = units.Short
PER_SECOND = units.RequestsPerSecond
PER_MINUTE = units.CountsPerMinute
SECONDS = units.Seconds
DAYS = units.Days
BYTES = units.BytesIEC
RATIO = units.PercentUnit
YUAN = "prefix:¥"
"""Grafana has no unit for yuan, and a prefix shows an amount in full, not in thousands."""

EIGHTH, SIXTH, QUARTER, THIRD, HALF = 3, 4, 6, 8, 12
"""Widths of panels, of the 24 columns of a dashboard."""
_TALL = 8
_SHORT = 4
_LIMIT = "/(limit|floor)$/"

_ALERT_RULES = Path(__file__).parents[1] / "prometheus"

Panel = timeseries.Panel | stat.Panel | bargauge.Panel | statetimeline.Panel | table.Panel
Queries = Mapping[str, str]
"""Queries by legend; a legend that ends in `limit` or `floor` is drawn as such."""
Steps = tuple[tuple[float | None, str], ...]
"""The colour from each value on; None is the lowest."""

_P = TypeVar("_P", timeseries.Panel, stat.Panel, bargauge.Panel, statetimeline.Panel, table.Panel)


def rising_thresholds(warning: float, critical: float) -> Steps:
    """Green, yellow from `warning`, red from `critical`."""
    return (None, "green"), (warning, "yellow"), (critical, "red")


def falling_thresholds(critical: float, warning: float) -> Steps:
    """Red below `critical`, yellow below `warning`, then green."""
    return (None, "red"), (critical, "yellow"), (warning, "green")


GREEN: Steps = ((None, "green"),)
RED_FROM_ONE: Steps = ((None, "green"), (1, "red"))


def graph(
    title: str,
    text: str,
    unit: str,
    queries: Queries,
    *,
    width: int = HALF,
    steps: Steps = GREEN,
    stacked: bool = False,
    maximum: float | None = None,
    empty: str = "",
) -> timeseries.Panel:
    """A line chart from zero; thresholds above the first are dashed lines."""
    panel = _panel(timeseries.Panel(), title, text, unit, queries, width, steps, empty).height(_TALL).min(0)
    panel.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC))
    panel.legend(_legend()).tooltip(_tooltip()).show_points(VisibilityMode.NEVER).fill_opacity(8).line_width(1)
    if len(steps) > 1:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)
    if maximum is not None:
        panel.max(maximum)
    if any(legend.endswith(("limit", "floor")) for legend in queries):
        dashes = DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 8]})
        panel.override_by_regexp(_LIMIT, [dashes, DynamicConfigValue("custom.fillOpacity", 0)])
    return panel


def figure(
    title: str,
    text: str,
    unit: str,
    queries: Queries,
    *,
    width: int = SIXTH,
    steps: Steps = GREEN,
    decimals: int | None = None,
    empty: str = "",
) -> stat.Panel:
    """The latest value, large, with the colour of its threshold."""
    panel = _panel(stat.Panel(), title, text, unit, queries, width, steps, empty).height(_SHORT).min(0)
    panel.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
    panel.reduce_options(_last_value()).graph_mode(BigValueGraphMode.NONE)
    panel.color_mode(BigValueColorMode.VALUE if steps == GREEN else BigValueColorMode.BACKGROUND)
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def bars(
    title: str,
    text: str,
    unit: str,
    queries: Queries,
    *,
    width: int = HALF,
    steps: Steps = GREEN,
    maximum: float | None = None,
    empty: str = "",
) -> bargauge.Panel:
    """The latest values as bars."""
    panel = _panel(bargauge.Panel(), title, text, unit, queries, width, steps, empty).height(_TALL).min(0)
    panel.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
    panel.reduce_options(_last_value()).orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.BASIC)
    if maximum is not None:
        panel.max(maximum)
    return panel


def states(
    title: str, text: str, queries: Queries, names: Mapping[int, tuple[str, str]], *, width: int = HALF
) -> statetimeline.Panel:
    """A timeline of states, with names and colours by number."""
    panel = _panel(statetimeline.Panel(), title, text, units.NoUnit, queries, width, GREEN, "").height(_TALL)
    results = {str(state): ValueMappingResult(*names[state], index=index) for index, state in enumerate(names)}
    panel.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS)).mappings([ValueMap(results)])
    panel.fill_opacity(70).line_width(0)
    return panel.legend(_legend()).tooltip(_tooltip()).show_value(VisibilityMode.NEVER).merge_values(merge_values=True)


def alert_table(title: str, text: str, query: str, *, width: int = HALF) -> table.Panel:
    """A table of alerts by their labels. The value is a time, and the label `runbook` repeats the name of the alert."""
    panel = _panel(table.Panel(), title, text, units.NoUnit, {}, width, GREEN, "No alert is firing").height(_TALL)
    panel.with_target(_query(query, 0).instant().format(PromQueryFormat.TABLE))
    order = {name: index for index, name in enumerate(("severity", "alertname", "runbook", "Value"))}
    hidden = dict.fromkeys(("Time", "job"), True)
    layout = {"indexByName": order, "excludeByName": hidden, "renameByName": {"alertname": "alert", "Value": "since"}}
    panel.with_transformation(DataTransformerConfig("organize", options=layout))
    panel.sort_by([common.TableSortByFieldState().display_name("severity")])
    severities = {"page": ValueMappingResult(color="red"), "ticket": ValueMappingResult(color="yellow")}
    cell = DynamicConfigValue("custom.cellOptions", {"type": "color-background"})
    panel.override_by_name("severity", [DynamicConfigValue("mappings", [ValueMap(severities)]), cell])
    panel.override_by_name("since", [DynamicConfigValue("unit", units.DateTimeFromNow)])
    # Grafana can't change the case of a value, but fragments are in lower case.
    entries = {name: ValueMappingResult(name.lower(), index=index) for index, name in enumerate(_alert_names())}
    link = {"title": "What to do", "url": "${runbook}#${__value.text}", "targetBlank": True}
    properties = {"mappings": [ValueMap(entries)], "links": [link]}
    return panel.override_by_name("runbook", [DynamicConfigValue(*each) for each in properties.items()])


def _alert_names() -> list[str]:
    texts = [path.read_text("utf-8") for path in _ALERT_RULES.glob("alerts-*.yaml")]
    return sorted({name for text in texts for name in re.findall(r"^ *- alert: (\w+)$", text, re.MULTILINE)})


def _panel(panel: _P, title: str, text: str, unit: str, queries: Queries, width: int, steps: Steps, empty: str) -> _P:
    """Set the properties of all panels. Only line charts and timelines query a range."""
    past = isinstance(panel, timeseries.Panel | statetimeline.Panel)
    panel.title(title).description(text).datasource(SOURCE).unit(unit).span(width)
    thresholds = [Threshold(value, colour) for value, colour in steps]
    panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(thresholds))
    for index, (legend, expression) in enumerate(queries.items()):
        query = _query(expression, index).legend_format(legend)
        panel.with_target(query.range() if past else query.instant())
    if empty:
        panel.no_value(empty)
    return panel


def _query(expression: str, index: int) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expression).ref_id(chr(ord("A") + index))
    return query.editor_mode(QueryEditorMode.CODE).datasource(SOURCE)


def _legend() -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(show_legend=True).calcs([])
    return legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)


def _last_value() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(values=False)
