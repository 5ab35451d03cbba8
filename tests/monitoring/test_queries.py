"""Whatever is asked by a dashboard or a rule is answered by a gateway that has something to tell."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.monitoring.conftest import Seen
from tests.monitoring.queries import Choice, Query, Rule, arms, choices, panels, rules, selectors, texts

SILENT: Mapping[str, str] = {}
"""Queries that may have no answer though all is well, and why."""


@pytest.mark.parametrize("query", panels(), ids=lambda query: query.place)
def test_panel(seen: Seen, query: Query) -> None:
    """A panel shows something, and so does each part of it that another one stands in for."""
    for part in arms(query.text):
        answer = seen.prometheus.then(part) if query.instant else seen.prometheus.ever(part)
        assert answer or part in SILENT, part


@pytest.mark.parametrize("query", sorted(set(texts())), ids=lambda text: text[:100])
def test_names(seen: Seen, query: str) -> None:
    """Each series that is asked for is there, with every value of a label that is named."""
    for each in selectors(query):
        assert seen.prometheus.ever(f"count({each})") or each in SILENT, each


@pytest.mark.parametrize("choice", choices(), ids=lambda choice: choice.place)
def test_choice(seen: Seen, choice: Choice) -> None:
    """A variable of a dashboard gives something to choose from."""
    assert seen.prometheus.values(choice.label, choice.series)


@pytest.mark.parametrize("rule", [each for each in rules() if each.recorded], ids=lambda rule: rule.name)
def test_record(seen: Seen, rule: Rule) -> None:
    """What a rule records is there."""
    assert seen.prometheus.ever(str(rule.recorded))


def test_rules_are_evaluated(seen: Seen) -> None:
    """No rule has failed on what two replicas tell, and none is missing."""
    found = seen.prometheus.rules()
    assert {each["name"]: each["lastError"] for each in found if each["health"] != "ok"} == {}
    assert len(found) == len(rules())


def test_silent_ones_are_asked() -> None:
    """No excuse is kept for what nobody asks."""
    asked = {part for query in panels() for part in arms(query.text)}
    asked |= {each for text in texts() for each in selectors(text)}
    assert SILENT.keys() <= asked
