"""Layout of the dashboards: variables, links and rows."""

from __future__ import annotations

import json
from collections.abc import Iterable

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableModel,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from msgspec import Struct

from deploy.grafana.panels import SOURCE, Panel
from deploy.grafana.queries import series

TAG = "imaging-gateway"
"""The tag of all dashboards; each links to all others that have it."""
RUNBOOK = "https://imaging-gateway.example/RUNBOOK.md"
"""The address of the published RUNBOOK.md, the default of the dashboard variable `runbook`."""


_START = series("process_start_time_seconds")
_VERSION = f"on (job, instance) group_left (version) {series('gateway_build_info')}"
# The SDK has no type for annotations of Prometheus. The value of each sample is its time, in milliseconds.
_ROLLOUTS = {
    "name": "Rollouts",
    "datasource": SOURCE,
    "enable": True,
    "iconColor": "blue",
    "target": {"expr": f"1000 * {_START} * {_VERSION}", "refId": "rollouts"},
    "titleFormat": "{{version}} started",
    "textFormat": "{{instance}}",
    "tagKeys": "version",
    "useValueForTime": "on",
}
"""The starts of processes: several at once with another version are a rollout."""


class Variable(Struct, frozen=True):
    """A variable with the values of a metric's label."""

    name: str
    metric: str
    description: str


class Row(Struct, frozen=True):
    """A heading with panels, from left to right and then downwards."""

    title: str
    panels: tuple[Panel, ...]


class Dashboard(Struct, frozen=True):
    """A dashboard. `name` is that of its file and its uid, which alerts and bookmarks use."""

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()
    time_from: str = "now-6h"

    def render(self) -> str:
        """Return the JSON that Grafana imports; the same on every machine."""
        builder = (
            dashboard.Dashboard(f"Imaging gateway: {self.title}")
            .uid(f"gateway-{self.name}")
            .description(self.description)
            .tags([TAG])
            .time(self.time_from, "now")
            .timezone("browser")
            .refresh("1m")
            .tooltip(DashboardCursorSync.CROSSHAIR)
        )
        for variable in self._variables():
            builder.with_variable(variable)
        for link in _links():
            builder.link(link)
        number = 0
        for row in self.rows:
            number += 1
            builder.with_row(dashboard.Row(row.title).id(number))
            for panel in row.panels:
                number += 1
                builder.with_panel(panel.id(number))
        document = {**builder.build().to_json(), "annotations": {"list": [_ROLLOUTS]}}
        return json.dumps(document, cls=JSONEncoder, sort_keys=True, indent=2, ensure_ascii=False) + "\n"

    def _variables(self) -> Iterable[Builder[VariableModel]]:
        yield dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        # `.*` as the value of All also matches series without a namespace.
        yield (
            _query_variable("namespace", "label_values(gateway_build_info, namespace)")
            .description("The gateway to show, if one Prometheus scrapes several.")
            .current(VariableOption(selected=True, text="All", value="$__all"))
        )
        for variable in self.variables:
            yield (
                _query_variable(variable.name, f"label_values({series(variable.metric)}, {variable.name})")
                .description(variable.description)
                .multi(multi=True)
                .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
            )
        yield dashboard.ConstantVariable("runbook").label("Runbook").value(RUNBOOK)


def _query_variable(name: str, values: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query({"query": values, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .include_all(include_all=True)
        .all_value(".*")
    )


def _links() -> Iterable[dashboard.DashboardLink]:
    yield (
        dashboard.DashboardLink("Gateway")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(as_dropdown=False)
        .include_vars(include_vars=True)
        .keep_time(keep_time=True)
    )
    yield (
        dashboard.DashboardLink("Runbook")
        .type(DashboardLinkType.LINK)
        .url("${runbook}")
        .icon("doc")
        .tooltip("The meaning of each alert, and what to do")
        .target_blank(target_blank=True)
    )
