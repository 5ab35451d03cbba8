"""The dashboards ask for what there is, add up what can be added, and can be read by whoever imports them."""

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
    """A query of a panel, with the spans that Grafana fills in filled in."""

    text: str
    legend: str

    @property
    def labels(self) -> Labels:
        """The labels by which the lines of its answer differ."""
        return result_labels(self.text, exported_series())


def dashboard_uids() -> set[str]:
    return {board["uid"] for board in DASHBOARDS.values()}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in board["panels"] if each["type"] != "row"]


def queries(board: dict[str, Any]) -> Iterator[Query]:
    for panel in panels(board):
        for target in panel["targets"]:
            yield Query(target["expr"].replace("$__rate_interval", "5m"), target["legendFormat"])


parametrize_dashboard = pytest.mark.parametrize("board", DASHBOARDS.values(), ids=DASHBOARDS)
parametrize_panel = pytest.mark.parametrize(
    "panel",
    [
        pytest.param(panel, id=f"{name}-{panel['title']}")
        for name, board in DASHBOARDS.items()
        for panel in panels(board)
    ],
)
parametrize_query = pytest.mark.parametrize(
    "query",
    [
        pytest.param(query, id=f"{name}-{place}")
        for name, board in DASHBOARDS.items()
        for place, query in enumerate(queries(board))
    ],
)


@parametrize_query
def test_asks_for_what_there_is(query: Query) -> None:
    """A query parses, and every series and label in it is exported or recorded."""
    assert find_errors(query.text, exported_series()) == []


@parametrize_query
def test_keeps_to_the_chosen_namespace(query: Query) -> None:
    """A query looks nowhere but into the namespace that was chosen."""
    assert [use.name for use in series_uses(query.text) if "namespace" not in use.matched_labels] == []


@parametrize_query
def test_adds_up_only_what_each_process_counts_itself(query: Query) -> None:
    """What all processes read alike is reduced to one value before anything else is done with it."""
    spans = {"rate", "increase", "deriv"}
    for use in series_uses(query.text):
        if use.name in ledger_series():
            assert next(each for each in use.enclosing if each not in spans) in {"max", "min"}


@parametrize_query
def test_takes_the_rate_of_counters(query: Query) -> None:
    """What only ever grows is shown by how fast it does."""
    for use in series_uses(query.text):
        if use.name.endswith(("_total", "_bucket", "_sum", "_count")):
            assert use.enclosing[0] in {"rate", "increase"}


@parametrize_query
def test_lines_can_be_told_apart(query: Query) -> None:
    """Each label by which the lines of a query differ is in its legend; of a process it is the instance."""
    shown = set(re.findall(r"{{(\w+)}}", query.legend))
    assert shown == (query.labels - TARGET_LABELS) | ({"instance"} & query.labels)


def test_every_metric_is_on_a_dashboard() -> None:
    """Nothing is exported that nobody can look at."""
    shown = {name for board in DASHBOARDS.values() for query in queries(board) for name in series_names(query.text)}
    unseen = {
        name
        for name in exported_series()
        if name.startswith("gateway_") and name not in shown and re.sub("_(sum|count)$", "_bucket", name) not in shown
    }
    assert unseen == set()


@parametrize_panel
def test_says_what_it_shows(panel: dict[str, Any]) -> None:
    """A panel has a title, a text of at least a sentence, a unit that Grafana knows, and thresholds."""
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert len(panel["description"]) > len(panel["title"])
    assert defaults["unit"] in UNITS or defaults["unit"].startswith("prefix:")
    assert defaults["thresholds"]["steps"][0]["value"] is None


@parametrize_panel
def test_leaves_the_data_source_to_whoever_imports_it(panel: dict[str, Any]) -> None:
    """A panel and its queries know their data source by a variable only."""
    assert panel["datasource"] == SOURCE
    assert {json.dumps(each["datasource"], sort_keys=True) for each in panel["targets"]} == {json.dumps(SOURCE)}


@parametrize_dashboard
def test_defines_what_it_uses(board: dict[str, Any]) -> None:
    """The variables of a dashboard are those that its queries and links name, and no others."""
    defined = {each["name"] for each in board["templating"]["list"]}
    rest = {**board, "templating": None}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(rest)))
    assert used == defined


@parametrize_dashboard
def test_all_means_also_without_the_label(board: dict[str, Any]) -> None:
    """To choose all matches series that lack the label: a pattern that matches nothing matches what is not there."""
    chosen = [each for each in board["templating"]["list"] if each["type"] == "query"]
    assert "namespace" in {each["name"] for each in chosen}
    for variable in chosen:
        assert variable["includeAll"]
        assert variable["current"]["value"] in ("$__all", ["$__all"])
        assert re.fullmatch(variable["allValue"], "") is not None


@parametrize_dashboard
def test_choices_are_read_from_what_there_is(board: dict[str, Any]) -> None:
    """The values of a variable are those of a label that its series have."""
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            assert variable["datasource"] == SOURCE
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked
            assert find_errors(asked[1], exported_series()) == []
            assert asked[2] in result_labels(asked[1], exported_series())


@parametrize_dashboard
def test_rows_are_full_and_nothing_overlaps(board: dict[str, Any]) -> None:
    """Panels lie side by side over all columns, none on top of another, and none without a heading."""
    places = [each["gridPos"] for each in board["panels"]]
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for top in {each["y"] for each in places}:
        assert sum(each["w"] for each in places if each["y"] == top) == COLUMNS
        assert len({each["h"] for each in places if each["y"] == top}) == 1
    assert board["panels"][0]["type"] == "row"


@parametrize_dashboard
def test_no_two_panels_have_a_name_or_number_in_common(board: dict[str, Any]) -> None:
    """A panel can be spoken of, and linked to."""
    assert len({each["title"] for each in panels(board)}) == len(panels(board))
    assert len({each["id"] for each in board["panels"]}) == len(board["panels"])


@parametrize_dashboard
def test_can_be_imported_anywhere(board: dict[str, Any]) -> None:
    """A dashboard brings no number of its own, which another Grafana may have given to something else."""
    assert "id" not in board
    assert "version" not in board


@parametrize_dashboard
def test_is_read_back_as_it_was_written(board: dict[str, Any]) -> None:
    """A dashboard that is read by the schema of Grafana and written again has lost nothing, and gained nothing."""
    register_default_plugins()
    assert json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder)) == board


@parametrize_dashboard
def test_leads_to_the_others_and_to_the_runbook(board: dict[str, Any]) -> None:
    """From each dashboard one gets to the others, in the same time and namespace, and to what to do."""
    others, runbook = board["links"]
    assert board["tags"] == others["tags"] == [TAG]
    assert others["type"] == "dashboards"
    assert others["keepTime"]
    assert others["includeVars"]
    assert runbook["url"] == "${runbook}"


def test_dashboards_keep_their_addresses() -> None:
    """Bookmarks find each dashboard where it has been."""
    assert dashboard_uids() == {"gateway-service", "gateway-tenants", "gateway-upstream", "gateway-tasks"}


def test_alerts_lead_to_dashboards() -> None:
    """Each dashboard that an alert names is one of these."""
    alerts = "".join(each.read_text("utf-8") for each in RULES.glob("alerts-*.yaml"))
    assert set(re.findall(r"dashboard: .*/d/(\S+)", alerts)) <= dashboard_uids()
    assert alerts.count("dashboard: ") == alerts.count("alert: ")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: each.sli)
def test_promises_are_those_that_are_alerted_on(objective: Any) -> None:
    """A budget that is shown as burning at 14.4 times its pace is one that an alert fires on."""
    alerts = (RULES / "alerts-slo.yaml").read_text("utf-8")
    assert f'ratio_rate1h{{sli="{objective.sli}"}} > 14.4 * {1 - objective.share:.4g}\n' in alerts
