"""The rendered resources are valid and consistent; the files in `golden/` have their exact content."""

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
from service.setting_types import Role
from service.settings import Settings
from tests.cli.conftest import Shell, shell
from tests.deploy.kubernetes.release import (
    REDIS_URL,
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

OLDEST_KUBERNETES = re.findall(r"^kubeVersion: \W*(\d+\.\d+)", (CHART / "Chart.yaml").read_text(), re.MULTILINE)[0]


@pytest.mark.parametrize("name", RELEASES)
def test_syntax(name: str) -> None:
    """Helm has no complaint; resources are valid for the oldest and the newest Kubernetes, without unknown fields."""
    assert helm("lint", "--strict", "--quiet", CHART, f"--values={EXAMPLES[name]}") == ""
    for item in render_release(name):
        if not item["apiVersion"].startswith("monitoring.coreos.com/"):
            for version in (OLDEST_KUBERNETES, kubernetes_validate.latest_version()):
                assert version.startswith(kubernetes_validate.validate(dict(item), version, strict=True))


@pytest.mark.parametrize("name", RELEASES)
def test_names(name: str) -> None:
    """Names are unique by kind, and start with the release's name, however long it is."""
    names = [(item["kind"], item["metadata"]["name"]) for item in render_release(name)]
    assert len(set(names)) == len(names)
    assert all(item.startswith("photos-imaging-gateway") for _, item in names)
    long = render_release(name, f'fullnameOverride="{"a" * 63}"')
    assert max(len(item["metadata"]["name"]) for item in long) <= 63


def test_selectors() -> None:
    """The selectors of a role match exactly its pods; only the Service of the metrics selects both, none the Job."""
    resources = render_release("production")
    labels = {owner: pod["metadata"]["labels"] for owner, pod in pod_templates(resources)}

    def selected(selector: Any) -> list[str]:
        return [owner for owner, found in labels.items() if matches_selector(selector, found)]

    for role in ROLES:
        deployment = get_resource(resources, "Deployment", f"-{role}")["spec"]
        budget = get_resource(resources, "PodDisruptionBudget", f"-{role}")["spec"]
        spread = deployment["template"]["spec"]["topologySpreadConstraints"]
        selectors = [deployment["selector"], budget["selector"], *(item["labelSelector"] for item in spread)]
        for selector in selectors:
            assert selected(selector["matchLabels"]) == [f"photos-imaging-gateway-{role}"]
    for suffix, roles in (("", ["api"]), ("-operators", ["api"]), ("-metrics", ROLES)):
        service = get_resource(resources, "Service", suffix)["spec"]
        assert selected(service["selector"]) == [f"photos-imaging-gateway-{role}" for role in roles]
    (path,) = get_resource(resources, "Ingress")["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"] == {"name": "photos-imaging-gateway", "port": {"name": "tenants"}}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("scales", [True, False])
def test_replicas(role: str, scales: bool) -> None:
    """Either the autoscaler or the Deployment sets the replicas, and one may always be evicted."""
    resources = render_release("default", f"{role}.autoscaling.enabled={json.dumps(scales)}")
    deployment = get_resource(resources, "Deployment", f"-{role}")
    scalers = resources_of_kind(resources, "HorizontalPodAutoscaler")
    scalers = [item for item in scalers if item["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]]
    assert (len(scalers), "replicas" in deployment["spec"]) == (int(scales), not scales)
    least = scalers[0]["spec"]["minReplicas"] if scales else deployment["spec"]["replicas"]
    budget = get_resource(resources, "PodDisruptionBudget", f"-{role}")["spec"]
    assert 1 <= budget["maxUnavailable"] < least


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


def rule_ports(rule: Any) -> list[int | str]:
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
    """Tenants reach their port of the api only, and without any the port is closed; policies can be disabled."""
    for settings, name, role, ports in (
        ([], "default", "api", ["tenants", "operators"]),
        ([], "production", "worker", ["operators"]),
        (["networkPolicy.tenants=[]"], "default", "api", ["operators"]),
    ):
        rules = policy_rules("ingress", role, *settings, name=name)
        assert [port for rule in rules for port in rule_ports(rule)] == ports
    assert resources_of_kind(render_release("default", "networkPolicy.enabled=false"), "NetworkPolicy") == []


@pytest.mark.parametrize(("name", "redis"), [("default", [6379]), ("sentinel", [6379, 26379]), ("cluster", [6379])])
def test_egress(name: str, redis: list[int]) -> None:
    """Both roles reach DNS, Redis and the upstream, workers also webhooks, and no private network but for Redis."""
    private = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7"}
    extra = 'networkPolicy.extraEgress=[{"ports":[{"port":9000}]}]'
    for role, webhooks in (("api", []), ("worker", [[443]])):
        rules = policy_rules("egress", role, extra, name=name)
        assert [rule_ports(item) for item in rules] == [[53], redis, [443], *webhooks, [9000]]
        assert {port["protocol"] for port in rules[0]["ports"]} == {"TCP", "UDP"}
        for rule in rules[2:-1]:
            assert private <= {network for peer in rule["to"] for network in peer["ipBlock"]["except"]}


def test_monitoring() -> None:
    """Rules and dashboards are included unchanged but for their links; Prometheus scrapes both roles."""
    resources = render_release("production", 'fullnameOverride="other"')
    rules = {item["metadata"]["name"]: item["spec"] for item in resources_of_kind(resources, "PrometheusRule")}
    assert rules.keys() == {f"other-{file.stem}" for file in RULE_FILES}
    for file in RULE_FILES:
        text = file.read_text("utf-8").replace("https://grafana.example", "https://graphs.example")
        text = text.replace(
            "https://imaging-gateway.example/RUNBOOK.md", "https://wiki.example/imaging-gateway/runbook"
        )
        assert rules[f"other-{file.stem}"]["groups"] == yaml.safe_load(text)["groups"]
    maps = resources_of_kind(resources, "ConfigMap")
    maps = [item for item in maps if "grafana_dashboard" in item["metadata"]["labels"]]
    dashboards = {name: json.loads(text) for item in maps for name, text in item["data"].items()}
    assert dashboards == {f"imaging-gateway-{name}.json": dashboard for name, dashboard in DASHBOARDS.items()}
    (monitor,) = [item["spec"] for item in resources_of_kind(resources, "ServiceMonitor")]
    services = {item["metadata"]["name"]: item for item in resources_of_kind(resources, "Service")}
    labels = services["other-metrics"]["metadata"]["labels"]
    assert matches_selector(monitor["selector"]["matchLabels"], labels)
    for name in ("other", "other-operators"):
        assert not matches_selector(monitor["selector"]["matchLabels"], services[name]["metadata"]["labels"])
    assert labels[monitor["jobLabel"]] == "imaging-gateway"  # which the rules select
    assert [(item["port"], item["path"]) for item in monitor["endpoints"]] == [("operators", "/metrics")]


@pytest.mark.parametrize("role", ROLES)
def test_token_of_metrics(role: str, tmp_path: Path) -> None:
    """With a Secret for it, both roles ask for the token of metrics, and Prometheus sends it."""
    secret = 'secrets.metricsToken.existingSecret="scraping"'
    tokens = [pod_settings(tmp_path, "production", role, *given).metrics_token for given in ([], [secret])]
    assert [bool(token) for token in tokens] == [False, True]
    (monitor,) = resources_of_kind(render_release("production", secret), "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "scraping", "key": "metrics-token"}}


def test_named_operators(tmp_path: Path) -> None:
    """With operators of their own the admin token is optional."""
    operators = f'settings.operators="ops:admin:{"0" * 64}"'
    given = ['secrets.adminToken.existingSecret=""', operators, "registry.enabled=false"]
    settings = pod_settings(tmp_path, "production", "api", *given)
    assert settings.admin_token is None
    assert settings.operators


def registry_job(*settings: str) -> tuple[Any, Any]:
    """Return the pod of the Job that applies the registry, and its container."""
    pod = get_resource(render_release("production", *settings), "Job", "-registry")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    return pod, container


def test_registry_job(tmp_path: Path) -> None:
    """The Job calls the operators' Service with a mounted file, and with no secret but their token and the file's."""
    pod, container = registry_job()
    service = get_resource(render_release("production"), "Service", "-operators")
    (port,) = service["spec"]["ports"]
    assert f"--url=http://{service['metadata']['name']}:{port['port']}" in container["args"]
    environment = pod_environment(pod, tmp_path)
    settings = Settings.load({name: text for name, text in environment.items() if name.startswith("GATEWAY_")})
    assert settings.admin_token
    assert (settings.redis_url, settings.secret_keys) == (None, ())
    assert [item["name"] for item in container["env"] if "valueFrom" in item] == ["MAIN_USER_KEY"]
    (mount,) = [item for item in container["volumeMounts"] if item["name"] == "registry"]
    (volume,) = [item for item in pod["spec"]["volumes"] if item["name"] == "registry"]
    (item,) = volume["configMap"]["items"]
    assert container["args"][:2] == ["apply", f"{mount['mountPath']}/{item['path']}"]
    config_map = get_resource(render_release("production"), "ConfigMap", "-registry")
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert item["key"] in config_map["data"]
    theirs, _ = registry_job('registry.toml=""', 'registry.existingConfigMap="theirs"')
    assert "theirs" in [volume.get("configMap", {}).get("name") for volume in theirs["spec"]["volumes"]]


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


def pod_template(name: str, role: str, *settings: str) -> Any:
    return get_resource(render_release(name, *settings), "Deployment", f"-{role}")["spec"]["template"]


def pod_settings(folder: Path, name: str, role: str, *settings: str) -> Settings:
    return Settings.load(pod_environment(pod_template(name, role, *settings), folder))


@pytest.mark.parametrize("name", RELEASES)
def test_restricted(name: str) -> None:
    """Every pod fulfils the restricted security standard, with the image's user, no rights and a read-only root."""
    dockerfile = (Path(__file__).parents[3] / "Dockerfile").read_text("utf-8")
    for _, pod in pod_templates(render_release(name)):
        spec, context = pod["spec"], pod["spec"]["securityContext"]
        assert spec["automountServiceAccountToken"] is False
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
        # Secrets can be read by the group: it is fsGroup, since their files belong to root.
        assert context["fsGroup"] == context["runAsGroup"]
        kinds = {kind for volume in spec["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= {"projected", "emptyDir", "configMap"}


@pytest.mark.parametrize("name", ["default", "production"])
@pytest.mark.parametrize("role", ROLES)
def test_settings(name: str, role: str, tmp_path: Path) -> None:
    """With its Secrets, a pod's environment is valid in production, on the chart's ports."""
    settings = pod_settings(tmp_path, name, role)
    assert settings.is_production
    assert (settings.role, settings.redis_url) == (Role(role), REDIS_URL)
    mounted = pod_environment(pod_template(name, role), tmp_path)
    assert ("GATEWAY_ADMIN_TOKEN_FILE" in mounted) == (role == "api")
    (container,) = pod_template(name, role)["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"operators": settings.ops_port} | ({"tenants": settings.port} if role == "api" else {})
    # On every address, for clients outside the pod.
    assert settings.host == settings.ops_host == "0.0.0.0"


def test_given_settings(tmp_path: Path) -> None:
    """Given settings arrive unchanged: numbers as written, and the upstream's names."""
    settings = pod_settings(tmp_path, "production", "api", "settings.pollSeconds=0.5", 'settings.host="::"')
    assert (settings.max_image_bytes, settings.max_image_pixels) == (20 << 20, 25_000_000)
    assert (settings.traces_share, settings.poll_seconds) == (0.05, 0.5)
    assert settings.models == {"general": "通用模型", "anime": "动漫模型"}
    assert settings.host == settings.ops_host == "::"


@pytest.mark.parametrize("role", ROLES)
def test_termination(tmp_path: Path, role: str) -> None:
    """The grace period covers open requests and then the settlement of their leases."""
    setting = "settings.leaseSeconds=3600"
    spec = pod_template("default", role, setting)["spec"]
    before = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    settings = pod_settings(tmp_path, "default", role, setting)
    assert spec["terminationGracePeriodSeconds"] > before + 2 * settings.lease_seconds
