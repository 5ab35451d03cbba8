"""The dashboards query existing series, aggregate correctly and are readable."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.__main__ import render_all
from deploy.grafana.layout import TAG
from deploy.grafana.objectives import OBJECTIVES
from tests.deploy.promql import Labels, find_errors, result_labels, series_names, series_uses
from tests.deploy.series import RULES, TARGET_LABELS, exported_series, ledger_series

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
DASHBOARDS: dict[str, Any] = {name: json.loads(text) for name, text in render_all().items()}
UNITS = {unit for name, unit in vars(units).items() if not name.startswith("_")}


class Query(NamedTuple):
    """A query of a panel with Grafana's intervals filled in."""

    text: str
    legend: str

    @property
    def labels(self) -> Labels:
        """Return the labels that distinguish the lines of its result."""
        return result_labels(self.text, exported_series())


def dashboard_uids() -> set[str]:
    return {dashboard["uid"] for dashboard in DASHBOARDS.values()}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in dashboard["panels"] if item["type"] != "row"]


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield Query(target["expr"].replace("$__rate_interval", "5m"), target["legendFormat"])


parametrize_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
parametrize_panel = pytest.mark.parametrize(
    "panel",
    [
        pytest.param(panel, id=f"{name}-{panel['title']}")
        for name, dashboard in DASHBOARDS.items()
        for panel in panels(dashboard)
    ],
)
parametrize_query = pytest.mark.parametrize(
    "query",
    [
        pytest.param(query, id=f"{name}-{place}")
        for name, dashboard in DASHBOARDS.items()
        for place, query in enumerate(queries(dashboard))
    ],
)


@parametrize_query
def test_series_and_labels_exist(query: Query) -> None:
    """A query parses, and all its series and labels are exported or recorded."""
    assert find_errors(query.text, exported_series()) == []


@parametrize_query
def test_namespace(query: Query) -> None:
    """Every selector has the chosen namespace."""
    assert [use.name for use in series_uses(query.text) if "namespace" not in use.matched_labels] == []


@parametrize_query
def test_ledger_series_are_not_summed(query: Query) -> None:
    """Series that all processes export alike are reduced to one value first."""
    spans = {"rate", "increase", "deriv"}
    for use in series_uses(query.text):
        if use.name in ledger_series():
            assert next(item for item in use.enclosing if item not in spans) in {"max", "min"}


@parametrize_query
def test_counters_have_a_rate(query: Query) -> None:
    for use in series_uses(query.text):
        if use.name.endswith(("_total", "_bucket", "_sum", "_count")):
            assert use.enclosing[0] in {"rate", "increase"}


@parametrize_query
def test_legends(query: Query) -> None:
    """The legend has every label that distinguishes lines; for a process that is the instance."""
    legend = set(re.findall(r"{{(\w+)}}", query.legend))
    assert legend == (query.labels - TARGET_LABELS) | ({"instance"} & query.labels)


def test_every_metric_is_on_a_dashboard() -> None:
    used = {
        name for dashboard in DASHBOARDS.values() for query in queries(dashboard) for name in series_names(query.text)
    }
    unseen = {
        name
        for name in exported_series()
        if name.startswith("gateway_") and name not in used and re.sub("_(sum|count)$", "_bucket", name) not in used
    }
    assert unseen == set()


@parametrize_panel
def test_panels_are_described(panel: dict[str, Any]) -> None:
    """A panel has a title, at least a sentence of text, a unit known to Grafana, and thresholds."""
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert len(panel["description"]) > len(panel["title"])
    assert defaults["unit"] in UNITS or defaults["unit"].startswith("prefix:")
    assert defaults["thresholds"]["steps"][0]["value"] is None


@parametrize_panel
def test_data_source_is_a_variable(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == SOURCE
    assert {json.dumps(target["datasource"], sort_keys=True) for target in panel["targets"]} == {json.dumps(SOURCE)}


@parametrize_dashboard
def test_variables_are_used(dashboard: dict[str, Any]) -> None:
    """The variables of a dashboard are exactly those in its queries and links."""
    defined = {item["name"] for item in dashboard["templating"]["list"]}
    rest = {**dashboard, "templating": None}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(rest)))
    assert used == defined


@parametrize_dashboard
def test_all_matches_missing_labels(dashboard: dict[str, Any]) -> None:
    """The choice `All` also matches series without the label."""
    chosen = [item for item in dashboard["templating"]["list"] if item["type"] == "query"]
    assert "namespace" in {item["name"] for item in chosen}
    for variable in chosen:
        assert variable["includeAll"]
        assert variable["current"]["value"] in ("$__all", ["$__all"])
        assert re.fullmatch(variable["allValue"], "") is not None


@parametrize_dashboard
def test_variable_values_exist(dashboard: dict[str, Any]) -> None:
    """The values of a variable are those of an existing label."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            assert variable["datasource"] == SOURCE
            requested = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert requested
            assert find_errors(requested[1], exported_series()) == []
            assert requested[2] in result_labels(requested[1], exported_series())


@parametrize_dashboard
def test_rows_are_full(dashboard: dict[str, Any]) -> None:
    """Panels fill all columns without overlap, under a heading."""
    places = [item["gridPos"] for item in dashboard["panels"]]
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for top in {item["y"] for item in places}:
        assert sum(item["w"] for item in places if item["y"] == top) == COLUMNS
        assert len({item["h"] for item in places if item["y"] == top}) == 1
    assert dashboard["panels"][0]["type"] == "row"


@parametrize_dashboard
def test_titles_and_ids_are_unique(dashboard: dict[str, Any]) -> None:
    assert len({item["title"] for item in panels(dashboard)}) == len(panels(dashboard))
    assert len({item["id"] for item in dashboard["panels"]}) == len(dashboard["panels"])


@parametrize_dashboard
def test_no_numeric_id(dashboard: dict[str, Any]) -> None:
    """A dashboard has no numeric id, which could collide with another one."""
    assert "id" not in dashboard
    assert "version" not in dashboard


@parametrize_dashboard
def test_round_trip(dashboard: dict[str, Any]) -> None:
    """Reading a dashboard with Grafana's schema and writing it again changes nothing."""
    register_default_plugins()
    assert json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder)) == dashboard


@parametrize_dashboard
def test_links(dashboard: dict[str, Any]) -> None:
    """Each dashboard links to the others, with time and namespace, and to the runbook."""
    others, runbook = dashboard["links"]
    assert dashboard["tags"] == others["tags"] == [TAG]
    assert others["type"] == "dashboards"
    assert others["keepTime"]
    assert others["includeVars"]
    assert runbook["url"] == "${runbook}"


def test_uids_are_stable() -> None:
    """Bookmarks depend on the uids."""
    assert dashboard_uids() == {"gateway-service", "gateway-tenants", "gateway-upstream", "gateway-tasks"}


def test_alerts_link_to_dashboards() -> None:
    """Each dashboard linked from an alert exists."""
    alerts = "".join(item.read_text("utf-8") for item in RULES.glob("alerts-*.yaml"))
    assert set(re.findall(r"dashboard: .*/d/(\S+)", alerts)) <= dashboard_uids()
    assert alerts.count("dashboard: ") == alerts.count("alert: ")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda item: item.sli)
def test_burn_rate_of_the_alerts(objective: Any) -> None:
    """The burn rate shown as critical is the one that an alert fires on."""
    alerts = (RULES / "alerts-slo.yaml").read_text("utf-8")
    assert f'ratio_rate1h{{sli="{objective.sli}"}} > 14.4 * {1 - objective.target_ratio:.4g}\n' in alerts
