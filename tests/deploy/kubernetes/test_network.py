"""Who may reach whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.deploy.kubernetes.release import (
    RELEASES,
    ROLES,
    get_resource,
    matches_selector,
    pod_templates,
    render_release,
    resources_of_kind,
)

Rule = dict[str, Any]


def policy_rules(role: str, direction: str, *settings: str, name: str = "default") -> Sequence[Rule]:
    """The rules of a role in a direction, `ingress` or `egress`."""
    found: Sequence[Rule] = get_resource(render_release(name, *settings), "NetworkPolicy", f"-{role}")["spec"][
        direction
    ]
    return found


def allowed_peers(role: str, port: str, *settings: str, name: str = "default") -> Sequence[Any] | None:
    """Who may reach a port of a role; None if there is no rule, and a rule for all fails."""
    found = [each for each in policy_rules(role, "ingress", *settings, name=name) if each["ports"] == [{"port": port}]]
    assert len(found) <= 1
    return found[0]["from"] if found else None


@pytest.mark.parametrize("name", RELEASES)
def test_every_pod_is_behind_a_policy(name: str) -> None:
    """What no rule allows is refused, in both directions, to every pod."""
    resources = render_release(name)
    policies = resources_of_kind(resources, "NetworkPolicy")
    for _, pod in pod_templates(resources):
        labels = pod["metadata"]["labels"]
        (policy,) = [each for each in policies if matches_selector(each["spec"]["podSelector"]["matchLabels"], labels)]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


@pytest.mark.parametrize("name", RELEASES)
def test_no_rule_lets_all_in(name: str) -> None:
    """Every rule for what comes in says from whom, and no list of peers is empty, which would mean everybody."""
    for role in ROLES:
        for rule in policy_rules(role, "ingress", name=name):
            assert rule["from"]
            assert rule["ports"]
            assert {} not in rule["from"]


def test_tenants_reach_their_port_alone() -> None:
    """Who is named as a tenant reaches the tenants' port, and not that of the operators."""
    production = get_resource(render_release("production"), "NetworkPolicy", "-api")["spec"]["ingress"]
    assert len(production) == 2
    tenants, operators = (allowed_peers("api", port, name="production") for port in ("tenants", "operators"))
    assert tenants == [
        {"namespaceSelector": {"matchLabels": {"imaging-gateway/tenant": "true"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}},
    ]
    assert operators
    assert not [each for each in operators if each in tenants]


def test_nobody() -> None:
    """Without tenants nobody reaches the tenants' port, and without operators only the Job reaches theirs."""
    assert allowed_peers("api", "tenants", "networkPolicy.tenants=[]") is None
    for role in ROLES:
        (job,) = allowed_peers(role, "operators", "networkPolicy.operators=[]") or ()
        assert job["podSelector"]["matchLabels"]["app.kubernetes.io/name"] == "imaging-gateway-registry"


def test_by_default_the_own_namespace() -> None:
    """Left as it is, the release's own namespace may submit."""
    assert allowed_peers("api", "tenants") == [{"podSelector": {}}]


def test_workers_serve_no_tenants() -> None:
    """No rule speaks of a tenants' port where there is none."""
    assert allowed_peers("worker", "tenants", name="production") is None


@pytest.mark.parametrize("role", ROLES)
def test_prometheus(role: str) -> None:
    """Prometheus, where it is said to be, reaches the operators' port of each role."""
    found = allowed_peers(role, "operators", name="production")
    assert found is not None
    assert {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    } in found


def rule_ports(rule: Rule) -> list[int]:
    """The ports of a rule, each once."""
    return sorted({each["port"] for each in rule["ports"]})


@pytest.mark.parametrize(("name", "redis"), [("default", [6379]), ("sentinel", [6379, 26379]), ("cluster", [6379])])
def test_what_is_called(name: str, redis: list[int]) -> None:
    """Names, Redis and the upstream are called by both roles, webhooks by workers, and nothing else."""
    dns, store, upstream = policy_rules("api", "egress", name=name)
    assert policy_rules("worker", "egress", name=name)[:3] == [dns, store, upstream]
    assert len(policy_rules("worker", "egress", name=name)) == 4
    assert [rule_ports(each) for each in (dns, store, upstream)] == [[53], redis, [443]]
    assert {each["protocol"] for each in dns["ports"]} == {"TCP", "UDP"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("network", ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7"])
def test_not_into_the_cluster(role: str, network: str) -> None:
    """What is on the internet is no way into private networks, nor to the cloud's metadata."""
    for rule in policy_rules(role, "egress")[2:]:
        assert network in [each for block in rule["to"] for each in block["ipBlock"]["except"]]


def test_traces() -> None:
    """The collector of traces is reached if there is one, and only where it is."""
    for role, others in (("api", 3), ("worker", 4)):
        assert len(policy_rules(role, "egress")) == others
        *_, found = policy_rules(role, "egress", name="production")
        assert rule_ports(found) == [4318]
        assert found["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "tracing"}}}]


def test_more_egress() -> None:
    """Further rules for what goes out are added to both roles."""
    collector = '{"ports":[{"port":4318}],"to":[{"podSelector":{"matchLabels":{"app":"collector"}}}]}'
    for role in ROLES:
        assert rule_ports(policy_rules(role, "egress", f"networkPolicy.extraEgress=[{collector}]")[-1]) == [4318]


def test_without_policies() -> None:
    """Who has policies of their own can do without the chart's."""
    assert resources_of_kind(render_release("default", "networkPolicy.enabled=false"), "NetworkPolicy") == []
