"""The values of the chart, and errors for invalid ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.helm.chart import CHART, EXAMPLES, HelmError, render
from service.settings import SETTINGS, Scope, Settings, SettingsError
from tests.deploy.kubernetes.release import (
    REDIS_URLS,
    chart_values,
    get_resource,
    pod_environment,
    pod_templates,
    render_release,
)

SCHEMA: Any = json.loads((CHART / "values.schema.json").read_text("utf-8"))
CHART_VARIABLES = {
    "GATEWAY_ENV",
    "GATEWAY_ROLE",
    "GATEWAY_PORT",
    "GATEWAY_OPS_HOST",
    "GATEWAY_OPS_PORT",
}
DEVELOPMENT_VARIABLES = {setting.name for setting in SETTINGS if setting.scope is Scope.DEVELOPMENT}
SECRETS = {setting.name for setting in SETTINGS if setting.is_secret} - DEVELOPMENT_VARIABLES


def render_error(*settings: str) -> str:
    """Return Helm's error for the minimal values with these overrides."""
    with pytest.raises(HelmError) as caught:
        render(EXAMPLES["default"], *settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("replicas=3", "(root): Additional property replicas is not allowed"),
        ("api.replica=3", "api: Additional property replica is not allowed"),
        ("api.replicas=0", "api.replicas: Must be greater than or equal to 1"),
        ('settings.role="both"', "settings: Additional property role is not allowed"),
        ('settings.adminToken="x"', "settings: Additional property adminToken is not allowed"),
        ("settings.leaseSeconds=5", "settings.leaseSeconds: Must be greater than or equal to 90"),
        ('settings.leaseSeconds="180"', "settings.leaseSeconds: Invalid type. Expected: integer, given: string"),
        ('settings.logLevel="loud"', 'settings.logLevel must be one of the following: "debug", "info"'),
        ('settings.models={"anime":"x"}', "settings.models: general is required"),
        ('settings.upstreamUrl="upstream.example"', "settings.upstreamUrl: Does not match pattern"),
        ('settings.upstreamUrl=""', "settings.upstreamUrl must be the base address of the upstream"),
        ('image.repository=""', "image.repository must say where the image is"),
        ('image.digest="latest"', "image.digest: Does not match pattern"),
        ('secrets.redisUrl.existingSecret=""', "secrets.redisUrl.existingSecret must name the Secret"),
        ('secrets.redisUrl.value="redis://x"', "secrets.redisUrl: Additional property value is not allowed"),
        ('secrets.redisUrl="redis://x"', "secrets.redisUrl: Invalid type. Expected: object, given: string"),
        ('extraEnv=[{"name":"GATEWAY_ROLE","value":"all"}]', "extraEnv must not have GATEWAY_ROLE"),
        ('api.podLabels={"app.kubernetes.io/name":"x"}', "api.podLabels must not have app.kubernetes.io/name"),
        ("worker.autoscaling.minReplicas=0", "worker.autoscaling.minReplicas: Must be greater than or equal to 1"),
        ("api.autoscaling.minReplicas=9", "api.autoscaling.minReplicas must not be more than maxReplicas"),
        ("api.disruptionBudget.maxUnavailable=0", "maxUnavailable: Must be greater than or equal to 1"),
        ("networkPolicy.redis.ports=[]", "networkPolicy.redis.ports: Array must have at least 1 items"),
        ('settings.upstreamUrl="https://[::1]:8443/x"', "networkPolicy.upstream.ports must have 8443"),
        ('settings.upstreamUrl="http://upstream.example"', "networkPolicy.upstream.ports must have 80"),
        ("networkPolicy.tenants=[{}]", "networkPolicy.tenants.0: Must have at least 1 properties"),
        ("ingress.enabled=true", "ingress.hosts must name at least one host"),
        ("monitoring.serviceMonitor.enabled=true", "networkPolicy.operators must permit Prometheus"),
        ("registry.enabled=true", "registry needs either toml or existingConfigMap"),
        ('registry={"enabled":true,"toml":"x","existingConfigMap":"x"}', "registry needs either toml or"),
        (
            'registry={"secretEnv":[{"name":"GATEWAY_ADMIN_TOKEN","existingSecret":"x","key":"x"}]}',
            "registry.secretEnv must not have GATEWAY_ADMIN_TOKEN",
        ),
    ],
)
def test_errors(setting: str, message: str) -> None:
    """Invalid values fail with an error that names the place and the reason."""
    assert message in render_error(setting)


@pytest.mark.parametrize(
    "policy",
    [
        {"upstream": {"ports": [443, 8443]}},
        {"upstream": {"ports": [9000], "to": [{"podSelector": {"matchLabels": {"app": "upstream"}}}]}},
        {"upstream": {"ports": [9000], "to": []}},
        {"extraEgress": [{"ports": [{"port": 8443}]}]},
        {"enabled": False},
    ],
)
def test_upstream_on_another_port(policy: object) -> None:
    """An upstream on another port is accepted if a policy allows it."""
    assert render_release(
        "default", 'settings.upstreamUrl="https://upstream.example:8443"', f"networkPolicy={json.dumps(policy)}"
    )


def find_mappings(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and content of every mapping in the schema."""
    if schema.get("type") == "object":
        yield path, schema
    for key in ("properties", "definitions"):
        for name, item in schema.get(key, {}).items():
            yield from find_mappings(item, f"{path}/{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from find_mappings(schema[key], f"{path}/{key}")


def test_unknown_keys_are_refused() -> None:
    """A mapping with known keys allows no others, except those of Kubernetes."""
    closed = [(path, mapping) for path, mapping in find_mappings(SCHEMA) if "properties" in mapping]
    assert len(closed) > 20
    assert [path for path, item in closed if item.get("additionalProperties") is not False] == []


def pair_keys(values: Any, schema: Any) -> Iterator[tuple[set[str], set[str]]]:
    """Yield the keys of the values and of the schema, by mapping."""
    if "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[1]]
    if isinstance(values, dict) and "properties" in schema:
        yield set(values), set(schema["properties"])
        for key, value in values.items():
            yield from pair_keys(value, schema["properties"][key])


def test_all_values_are_documented() -> None:
    """Every value is in values.yaml with its default, except settings."""
    (root, *nested) = pair_keys(chart_values(), SCHEMA)
    assert root[1] - root[0] == {"global"}
    unsaid = [known - there for there, known in nested if known != there]
    assert unsaid == [set(SCHEMA["properties"]["settings"]["properties"]) - chart_values()["settings"].keys()]


def variable_name(key: str) -> str:
    """Return the variable of a key of `settings`."""
    return "GATEWAY_" + re.sub(r"([A-Z])", r"_\1", key).upper()


def test_every_setting() -> None:
    """Every setting belongs to the values, a Secret, the chart or development."""
    output = {variable_name(key) for key in SCHEMA["properties"]["settings"]["properties"]}
    mounted = {variable_name(key) for key in SCHEMA["properties"]["secrets"]["properties"]}
    groups = [output, mounted, CHART_VARIABLES, DEVELOPMENT_VARIABLES]
    assert mounted == SECRETS
    assert sorted(name for group in groups for name in group) == sorted(setting.name for setting in SETTINGS)


def is_valid_setting(variable: str, text: str) -> bool:
    try:
        Settings.load({variable: text})
    except SettingsError:
        return False
    return True


def test_ranges() -> None:
    """The schema has the gateway's ranges of numbers."""
    bounds = {
        variable_name(key): (item["minimum"], item["maximum"], 1 if item["type"] == "integer" else 0.01)
        for key, item in SCHEMA["properties"]["settings"]["properties"].items()
        if "minimum" in item
    }
    assert len(bounds) == 6
    for name, (least, most, step) in bounds.items():
        assert is_valid_setting(name, str(least)), name
        assert is_valid_setting(name, str(most)), name
        assert not is_valid_setting(name, str(least - step)), name
        assert not is_valid_setting(name, str(most + step)), name


def test_choices() -> None:
    """The schema has the gateway's choices."""
    for key in ("logLevel", "upstreamCleartext"):
        for word in SCHEMA["properties"]["settings"]["properties"][key]["enum"]:
            assert is_valid_setting(variable_name(key), word)


def test_defaults() -> None:
    """The chart's defaults are those of the gateway, except for addresses."""
    result = {variable_name(key): str(value) for key, value in chart_values()["settings"].items() if value}
    own = {setting.name: setting.default for setting in SETTINGS}
    assert result == {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_LEASE_SECONDS": own["GATEWAY_LEASE_SECONDS"]}


def test_extras(tmp_path: Path) -> None:
    """Additional variables, volumes and node selectors apply to both roles."""
    resources = render_release(
        "default",
        'extraEnv=[{"name":"OTEL_RESOURCE_ATTRIBUTES","value":"team=images"}]',
        'extraVolumes=[{"name":"ca","configMap":{"name":"ca"}}]',
        'extraVolumeMounts=[{"name":"ca","mountPath":"/etc/ca"}]',
        'worker.nodeSelector={"disk":"ssd"}',
        'worker.tolerations=[{"key":"images","operator":"Exists"}]',
        'worker.affinity={"nodeAffinity":{}}',
        'worker.podLabels={"team":"images"}',
    )
    for _, pod in pod_templates(resources):
        (container,) = pod["spec"]["containers"]
        result = pod_environment(pod, tmp_path, REDIS_URLS["default"])
        assert result["OTEL_RESOURCE_ATTRIBUTES"] == "team=images"
        assert {"name": "ca", "mountPath": "/etc/ca"} in container["volumeMounts"]
        assert {"name": "ca", "configMap": {"name": "ca"}} in pod["spec"]["volumes"]
    worker = get_resource(resources, "Deployment", "-worker")["spec"]["template"]
    assert worker["spec"]["nodeSelector"] == {"disk": "ssd"}
    assert worker["spec"]["tolerations"] == [{"key": "images", "operator": "Exists"}]
    assert worker["spec"]["affinity"] == {"nodeAffinity": {}}
    assert worker["metadata"]["labels"]["team"] == "images"
    api = get_resource(resources, "Deployment", "-api")["spec"]["template"]
    assert not api["spec"].keys() & {"nodeSelector", "tolerations", "affinity"}


def test_existing_service_account() -> None:
    resources = render_release("default", "serviceAccount.create=false", 'serviceAccount.name="theirs"')
    assert {pod["spec"]["serviceAccountName"] for _, pod in pod_templates(resources)} == {"theirs"}
    assert not [resource for resource in resources if resource["kind"] == "ServiceAccount"]
