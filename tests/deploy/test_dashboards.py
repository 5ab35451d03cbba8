"""The dashboards query existing series, aggregate correctly and fit Grafana."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from grafana_foundation_sdk.models import units

from deploy.grafana.objectives import OBJECTIVES
from tests.deploy.queries import (
    DASHBOARDS,
    PROMETHEUS,
    ledger_series,
    list_selectors,
    metric_families,
    panel_queries,
    panels,
    query_variables,
)

UNITS = {unit for name, unit in vars(units).items() if not name.startswith("_")}


def test_queries() -> None:
    """Every selector has the chosen namespace, and series are aggregated as their kind requires."""
    for query in panel_queries():
        for selector in list_selectors(query.text):
            assert "namespace" in {label for label, _, _ in selector.matchers}, query.location
            if selector.name.endswith(("_total", "_bucket", "_sum", "_count")):
                assert selector.enclosing[0] in {"rate", "increase"}, query.location
            if selector.name in ledger_series():  # all processes export it alike
                around = [item for item in selector.enclosing if item not in {"rate", "increase", "deriv"}]
                assert around[0] in {"max", "min"}, query.location


def test_every_metric_is_on_a_dashboard() -> None:
    used = {selector.name for query in panel_queries() for selector in list_selectors(query.text)}
    assert metric_families() - {re.sub("_(total|bucket|sum|count)$", "", name) for name in used} == set()


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_variables(dashboard: dict[str, Any]) -> None:
    """All variables are used, and the choice `All` also matches series without the label."""
    defined = {item["name"] for item in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps({**dashboard, "templating": None}))) == defined
    for variable in query_variables(dashboard):
        assert variable["includeAll"]
        assert variable["current"]["value"] in ("$__all", ["$__all"])
        assert re.fullmatch(variable["allValue"], "") is not None


def test_units() -> None:
    """Grafana knows every unit: for others it shows the plain number."""
    for dashboard in DASHBOARDS.values():
        for panel in panels(dashboard):
            unit = panel["fieldConfig"]["defaults"]["unit"]
            assert unit in UNITS or unit.startswith("prefix:"), panel["title"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda item: item.sli)
def test_burn_rate_of_the_alerts(objective: Any) -> None:
    """The burn rate shown as critical is the one that an alert fires on."""
    alerts = (PROMETHEUS / "alerts-slo.yaml").read_text("utf-8")
    assert f'ratio_rate1h{{sli="{objective.sli}"}} > 14.4 * {1 - objective.target_ratio:.4g}\n' in alerts
