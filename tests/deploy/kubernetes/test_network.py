"""Network policies."""

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
    """Return the rules of a role for `ingress` or `egress`."""
    rules: Sequence[Rule] = get_resource(render_release(name, *settings), "NetworkPolicy", f"-{role}")["spec"][
        direction
    ]
    return rules


def allowed_peers(role: str, port: str, *settings: str, name: str = "default") -> Sequence[Any] | None:
    """Return the peers allowed to reach a role's port; None without a rule. Fails for a rule without peers."""
    results = [
        policy_rule
        for policy_rule in policy_rules(role, "ingress", *settings, name=name)
        if policy_rule["ports"] == [{"port": port}]
    ]
    assert len(results) <= 1
    return results[0]["from"] if results else None


@pytest.mark.parametrize("name", RELEASES)
def test_every_pod_has_a_policy(name: str) -> None:
    """Every pod has a policy for both directions."""
    resources = render_release(name)
    policies = resources_of_kind(resources, "NetworkPolicy")
    for _, pod in pod_templates(resources):
        labels = pod["metadata"]["labels"]
        (policy,) = [item for item in policies if matches_selector(item["spec"]["podSelector"]["matchLabels"], labels)]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


@pytest.mark.parametrize("name", RELEASES)
def test_ingress_names_its_peers(name: str) -> None:
    """Every ingress rule has peers, since an empty list would allow all."""
    for role in ROLES:
        for rule in policy_rules(role, "ingress", name=name):
            assert rule["from"]
            assert rule["ports"]
            assert {} not in rule["from"]


def test_tenants_reach_their_port_only() -> None:
    production = get_resource(render_release("production"), "NetworkPolicy", "-api")["spec"]["ingress"]
    assert len(production) == 2
    tenants, operators = (allowed_peers("api", port, name="production") for port in ("tenants", "operators"))
    assert tenants == [
        {"namespaceSelector": {"matchLabels": {"imaging-gateway/tenant": "true"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}},
    ]
    assert operators
    assert not [operator for operator in operators if operator in tenants]


def test_no_peers() -> None:
    """Without tenants the tenants' port is closed, and without operators only the Job reaches theirs."""
    assert allowed_peers("api", "tenants", "networkPolicy.tenants=[]") is None
    for role in ROLES:
        (job,) = allowed_peers(role, "operators", "networkPolicy.operators=[]") or ()
        assert job["podSelector"]["matchLabels"]["app.kubernetes.io/name"] == "imaging-gateway-registry"


def test_own_namespace_by_default() -> None:
    assert allowed_peers("api", "tenants") == [{"podSelector": {}}]


def test_workers_serve_no_tenants() -> None:
    assert allowed_peers("worker", "tenants", name="production") is None


@pytest.mark.parametrize("role", ROLES)
def test_prometheus(role: str) -> None:
    result = allowed_peers(role, "operators", name="production")
    assert result is not None
    assert {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    } in result


def rule_ports(rule: Rule) -> list[int]:
    return sorted({port["port"] for port in rule["ports"]})


@pytest.mark.parametrize(("name", "redis"), [("default", [6379]), ("sentinel", [6379, 26379]), ("cluster", [6379])])
def test_egress(name: str, redis: list[int]) -> None:
    """Both roles reach DNS, Redis and the upstream, workers also webhooks, and nothing else."""
    dns, store, upstream = policy_rules("api", "egress", name=name)
    assert policy_rules("worker", "egress", name=name)[:3] == [dns, store, upstream]
    assert len(policy_rules("worker", "egress", name=name)) == 4
    assert [rule_ports(item) for item in (dns, store, upstream)] == [[53], redis, [443]]
    assert {port["protocol"] for port in dns["ports"]} == {"TCP", "UDP"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("network", ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7"])
def test_private_networks_are_excluded(role: str, network: str) -> None:
    """Egress to the internet excludes private networks and the cloud's metadata."""
    for rule in policy_rules(role, "egress")[2:]:
        assert network in [item for block in rule["to"] for item in block["ipBlock"]["except"]]


def test_traces() -> None:
    """The collector is reachable only if there is one."""
    for role, others in (("api", 3), ("worker", 4)):
        assert len(policy_rules(role, "egress")) == others
        *_, result = policy_rules(role, "egress", name="production")
        assert rule_ports(result) == [4318]
        assert result["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "tracing"}}}]


def test_more_egress() -> None:
    collector = '{"ports":[{"port":4318}],"to":[{"podSelector":{"matchLabels":{"app":"collector"}}}]}'
    for role in ROLES:
        assert rule_ports(policy_rules(role, "egress", f"networkPolicy.extraEgress=[{collector}]")[-1]) == [4318]


def test_without_policies() -> None:
    assert resources_of_kind(render_release("default", "networkPolicy.enabled=false"), "NetworkPolicy") == []
