"""The rendered resources are valid and consistent: names, Services, network policies, monitoring, the registry."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.helm.chart import CHART, EXAMPLES, helm
from service import __version__
from service.settings import Settings
from tests.cli.conftest import Shell, shell
from tests.deploy.kubernetes.release import (
    RELEASES,
    ROLES,
    get_resource,
    matches_selector,
    pod_environment,
    pod_templates,
    render_release,
    resources_of_kind,
)
from tests.deploy.queries import DASHBOARDS, RULE_FILES

__all__ = ["shell"]

CHART_METADATA = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
OLDEST_KUBERNETES = re.sub(r"^>=(\d+\.\d+)\..*", r"\1", CHART_METADATA["kubeVersion"])


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", RELEASES)
def test_kubernetes_schemas(name: str, version: str) -> None:
    """Every resource is valid for the oldest and the newest Kubernetes, without unknown fields."""
    for item in render_release(name):
        if not item["apiVersion"].startswith("monitoring.coreos.com/"):
            assert version.startswith(kubernetes_validate.validate(dict(item), version, strict=True))


@pytest.mark.parametrize("name", RELEASES)
def test_helm_lint(name: str) -> None:
    assert helm("lint", "--strict", "--quiet", CHART, f"--values={EXAMPLES[name]}") == ""


def test_image() -> None:
    """The chart has the version of the gateway; an image can be pinned by digest, which overrides the tag."""
    assert CHART_METADATA["appVersion"] == __version__
    digest = f"sha256:{'0' * 64}"
    for settings, image in (
        ((), f"registry/imaging-gateway:{__version__}"),
        ((f'image.digest="{digest}"', 'image.tag="2"'), f"registry/imaging-gateway@{digest}"),
    ):
        pods = [pod for _, pod in pod_templates(render_release("default", *settings))]
        assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {image}


@pytest.mark.parametrize("name", RELEASES)
def test_names(name: str) -> None:
    """Names are unique by kind, and start with the release's name, however long it is."""
    names = [(item["kind"], item["metadata"]["name"]) for item in render_release(name)]
    assert len(set(names)) == len(names)
    assert all(item.startswith("photos-imaging-gateway") for _, item in names)
    long = render_release(name, f'fullnameOverride="{"a" * 63}"')
    assert max(len(item["metadata"]["name"]) for item in long) <= 63


@pytest.mark.parametrize("name", RELEASES)
def test_selectors(name: str) -> None:
    """The selectors of a role match exactly its pods; the operators' Service selects both roles, but not the Job."""
    resources = render_release(name)
    labels = {owner: pod["metadata"]["labels"] for owner, pod in pod_templates(resources)}

    def selected(selector: Any) -> list[str]:
        return [owner for owner, found in labels.items() if matches_selector(selector, found)]

    for role in ROLES:
        deployment = get_resource(resources, "Deployment", f"-{role}")["spec"]
        spread = deployment["template"]["spec"]["topologySpreadConstraints"]
        budget = get_resource(resources, "PodDisruptionBudget", f"-{role}")["spec"]
        selectors = [item["matchLabels"] for item in (deployment["selector"], budget["selector"])]
        selectors += [item["labelSelector"]["matchLabels"] for item in spread]
        policy = get_resource(resources, "NetworkPolicy", f"-{role}")["spec"]
        selectors.append(policy["podSelector"]["matchLabels"])
        selectors += [get_resource(resources, "Service")["spec"]["selector"]] if role == "api" else []
        for selector in selectors:
            assert selected(selector) == [f"photos-imaging-gateway-{role}"]
    operators = get_resource(resources, "Service", "-operators")["spec"]["selector"]
    assert selected(operators) == [f"photos-imaging-gateway-{role}" for role in ROLES]


@pytest.mark.parametrize("name", RELEASES)
def test_ports(name: str) -> None:
    """Every referenced port exists on its pods; tenants reach only theirs."""
    resources = render_release(name)
    for service in resources_of_kind(resources, "Service"):
        (port,) = service["spec"]["ports"]
        for _, pod in pod_templates(resources):
            if matches_selector(service["spec"]["selector"], pod["metadata"]["labels"]):
                (container,) = pod["spec"]["containers"]
                assert port["targetPort"] in {item["name"] for item in container["ports"]}
    assert get_resource(resources, "Service")["spec"]["ports"][0]["targetPort"] == "tenants"
    operators = get_resource(resources, "Service", "-operators")["spec"]
    assert (operators["type"], operators["ports"][0]["targetPort"]) == ("ClusterIP", "operators")
    for ingress in resources_of_kind(resources, "Ingress"):
        (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
        assert path["backend"]["service"] == {"name": "photos-imaging-gateway", "port": {"name": "tenants"}}


def test_ingress_timeouts() -> None:
    """The example's ingress waits for a submission, and never retries it."""
    resources = render_release("production")
    (container,) = get_resource(resources, "Deployment", "-api")["spec"]["template"]["spec"]["containers"]
    (lease,) = [int(item["value"]) for item in container["env"] if item["name"] == "GATEWAY_LEASE_SECONDS"]
    annotations = get_resource(resources, "Ingress")["metadata"]["annotations"]
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) >= lease
    assert annotations["nginx.ingress.kubernetes.io/proxy-next-upstream"] == "off"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("scales", [True, False])
def test_replicas(role: str, scales: bool) -> None:
    """Either the autoscaler or the Deployment sets the replicas, and one may always be evicted."""
    resources = render_release("default", f"{role}.autoscaling.enabled={json.dumps(scales)}")
    deployment = get_resource(resources, "Deployment", f"-{role}")
    scalers = resources_of_kind(resources, "HorizontalPodAutoscaler")
    scalers = [item for item in scalers if item["metadata"]["name"].endswith(role)]
    assert ("replicas" in deployment["spec"]) is not scales
    assert len(scalers) == scales
    least = deployment["spec"].get("replicas") or scalers[0]["spec"]["minReplicas"]
    budget = get_resource(resources, "PodDisruptionBudget", f"-{role}")["spec"]
    assert 1 <= budget["maxUnavailable"] < least
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]


def test_package(tmp_path: Path) -> None:
    """The packaged chart renders like its folder, with its links resolved."""
    helm("package", CHART, f"--destination={tmp_path}")
    (archive,) = tmp_path.iterdir()
    values = f"--values={EXAMPLES['production']}"
    assert helm("template", "photos", archive, values) == helm("template", "photos", CHART, values)
    with tarfile.open(archive) as opened:
        assert not [name for name in opened.getnames() if "/tests/" in name]


def policy_rules(direction: str, role: str, *settings: str, name: str = "default") -> Sequence[Any]:
    """Return the rules of a role for `ingress` or `egress`."""
    policy = get_resource(render_release(name, *settings), "NetworkPolicy", f"-{role}")
    rules: Sequence[Any] = policy["spec"][direction]
    return rules


def allowed_peers(role: str, port: str, *settings: str, name: str = "default") -> Any:
    """Return the peers allowed to reach a role's port; None without a rule."""
    rules = policy_rules("ingress", role, *settings, name=name)
    return next((rule["from"] for rule in rules if rule["ports"] == [{"port": port}]), None)


def rule_ports(rule: Any) -> list[int]:
    return sorted({port["port"] for port in rule["ports"]})


@pytest.mark.parametrize("name", RELEASES)
def test_every_pod_has_a_policy(name: str) -> None:
    """Every pod has a policy for both directions, whose ingress names its peers: an empty list would allow all."""
    resources = render_release(name)
    policies = resources_of_kind(resources, "NetworkPolicy")
    for _, pod in pod_templates(resources):
        labels = pod["metadata"]["labels"]
        (policy,) = [item for item in policies if matches_selector(item["spec"]["podSelector"]["matchLabels"], labels)]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        for rule in policy["spec"].get("ingress", ()):
            assert rule["from"]
            assert {} not in rule["from"]
            assert len(rule["ports"]) == 1


def test_ingress() -> None:
    """Tenants reach their port of the api only; operators, Prometheus and the registry's Job theirs of both roles."""
    job = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "imaging-gateway-registry"}}}
    prometheus = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    }
    tenants = [
        {"namespaceSelector": {"matchLabels": {"imaging-gateway/tenant": "true"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}},
    ]
    assert allowed_peers("api", "tenants") == [{"podSelector": {}}]
    assert allowed_peers("api", "tenants", name="production") == tenants
    assert allowed_peers("worker", "tenants", name="production") is None
    assert allowed_peers("api", "tenants", "networkPolicy.tenants=[]") is None
    for role in ROLES:
        for peers, name in (([], "default"), ([prometheus], "production")):
            first, *others = allowed_peers(role, "operators", name=name)
            assert first["podSelector"]["matchLabels"].items() >= job["podSelector"]["matchLabels"].items()
            assert others == peers


@pytest.mark.parametrize(("name", "redis"), [("default", [6379]), ("sentinel", [6379, 26379]), ("cluster", [6379])])
def test_egress(name: str, redis: list[int]) -> None:
    """Both roles reach DNS, Redis and the upstream, workers also webhooks, and no private network but for Redis."""
    private = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7"}
    for role, webhooks in (("api", []), ("worker", [[443]])):
        dns, store, *internet = policy_rules("egress", role, name=name)
        assert [rule_ports(item) for item in (dns, store, *internet)] == [[53], redis, [443], *webhooks]
        assert {port["protocol"] for port in dns["ports"]} == {"TCP", "UDP"}
        for rule in internet:
            assert private <= {network for peer in rule["to"] for network in peer["ipBlock"]["except"]}


def test_more_egress() -> None:
    """A collector and other peers are reachable if they are named; without policies there is none."""
    traces = policy_rules("egress", "api", name="production")[-1]
    assert rule_ports(traces) == [4318]
    assert traces["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "tracing"}}}]
    extra = '[{"ports":[{"port":9000}],"to":[{"podSelector":{"matchLabels":{"app":"other"}}}]}]'
    assert rule_ports(policy_rules("egress", "worker", f"networkPolicy.extraEgress={extra}")[-1]) == [9000]
    assert resources_of_kind(render_release("default", "networkPolicy.enabled=false"), "NetworkPolicy") == []


def test_rules_and_dashboards() -> None:
    """Every rule and dashboard is included unchanged, except for the links of alerts."""
    resources = render_release("production")
    rules = {item["metadata"]["name"]: item for item in resources_of_kind(resources, "PrometheusRule")}
    assert rules.keys() == {f"photos-imaging-gateway-{file.stem}" for file in RULE_FILES}
    for file in RULE_FILES:
        text = file.read_text("utf-8")
        text = text.replace(
            "https://imaging-gateway.example/RUNBOOK.md", "https://wiki.example/imaging-gateway/runbook"
        )
        groups = yaml.safe_load(text.replace("https://grafana.example", "https://graphs.example"))["groups"]
        rule = rules[f"photos-imaging-gateway-{file.stem}"]
        assert rule["spec"] == {"groups": groups}
        assert rule["metadata"]["labels"]["release"] == "prometheus"
    maps = resources_of_kind(resources, "ConfigMap")
    maps = [item for item in maps if "grafana_dashboard" in item["metadata"]["labels"]]
    dashboards = {name: json.loads(text) for item in maps for name, text in item["data"].items()}
    assert dashboards == {f"imaging-gateway-{name}.json": dashboard for name, dashboard in DASHBOARDS.items()}


def test_monitor() -> None:
    """Prometheus scrapes the operators' port of all replicas under the job name used in the rules."""
    resources = render_release("production", 'fullnameOverride="other"')
    (monitor,) = resources_of_kind(resources, "ServiceMonitor")
    selector, services = monitor["spec"]["selector"]["matchLabels"], resources_of_kind(resources, "Service")
    (service,) = [item for item in services if matches_selector(selector, item["metadata"]["labels"])]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert service["metadata"]["name"] == "other-operators"
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "imaging-gateway"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_disabled_by_default() -> None:
    """The default values need no Prometheus operator."""
    kinds = {item["kind"] for item in render_release("default")}
    assert not kinds & {"ServiceMonitor", "PrometheusRule", "ConfigMap", "Ingress", "Job"}


def registry_job(*settings: str) -> tuple[Any, Any]:
    """Return the Job that applies the registry, and its container."""
    job = get_resource(render_release("production", *settings), "Job", "-registry")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return job, container


def test_registry_job(tmp_path: Path) -> None:
    """After every change the Job calls the operators' Service, with no secret but their token and those of the file."""
    job, container = registry_job()
    assert job["metadata"]["annotations"] == {
        "helm.sh/hook": "post-install,post-upgrade",
        "helm.sh/hook-delete-policy": "before-hook-creation",
    }
    service = get_resource(render_release("production"), "Service", "-operators")
    (port,) = service["spec"]["ports"]
    assert f"--url=http://{service['metadata']['name']}:{port['port']}" in container["args"]
    environment = pod_environment(job["spec"]["template"], tmp_path, "")
    settings = Settings.load({name: text for name, text in environment.items() if name.startswith("GATEWAY_")})
    assert settings.admin_token
    assert (settings.redis_url, settings.secret_keys) == (None, ())
    (secret,) = [item for item in container["env"] if "valueFrom" in item]
    assert secret["name"] == "MAIN_USER_KEY"
    assert secret["valueFrom"] == {"secretKeyRef": {"name": "gateway-accounts", "key": "main"}}


def test_registry_file() -> None:
    """The file is mounted from a ConfigMap, which may be an existing one."""
    job, container = registry_job()
    (mount,) = [item for item in container["volumeMounts"] if item["name"] == "registry"]
    (volume,) = [item for item in job["spec"]["template"]["spec"]["volumes"] if item["name"] == "registry"]
    (item,) = volume["configMap"]["items"]
    assert container["args"][:2] == ["apply", f"{mount['mountPath']}/{item['path']}"]
    assert item["key"] in get_resource(render_release("production"), "ConfigMap", "-registry")["data"]
    theirs = ('registry.toml=""', 'registry.existingConfigMap="theirs"')
    maps = resources_of_kind(render_release("production", *theirs), "ConfigMap")
    assert not [item for item in maps if item["metadata"]["name"].endswith("-registry")]
    assert "{'name': 'theirs', 'items':" in str(registry_job(*theirs))


async def test_registry_command(shell: Shell, tmp_path: Path) -> None:
    """The Job's command applies the file, and a second run changes nothing."""
    file = tmp_path / "registry.toml"
    file.write_text(get_resource(render_release("production"), "ConfigMap", "-registry")["data"]["registry.toml"])
    shell.environ["MAIN_USER_KEY"] = "key-of-main"
    command, _, _, *options = registry_job()[1]["args"]
    assert "--prune" in options
    assert "--prune" not in registry_job("registry.prune=false")[1]["args"]
    assert "Applied" in (await shell.run(command, str(file), *options)).stdout
    assert "nothing to change" in (await shell.run(command, str(file), *options)).stdout
    registry = await shell.get_admin("/registry")
    assert registry["tenants"]["shop"]["max_active"] == 10
    assert registry["accounts"]["main"]["max_price"]["upscale"] == 3
