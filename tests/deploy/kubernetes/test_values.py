"""The values of the chart, and errors for invalid ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.helm.chart import CHART, EXAMPLES, HelmError, render
from service.settings import SETTINGS, Scope, Settings, SettingsError
from tests.deploy.kubernetes.release import REDIS_URLS, get_resource, pod_environment, pod_templates, render_release

SCHEMA: Any = json.loads((CHART / "values.schema.json").read_text("utf-8"))
VALUES: Any = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
CHART_VARIABLES = {"GATEWAY_ENV", "GATEWAY_ROLE", "GATEWAY_PORT", "GATEWAY_OPS_HOST", "GATEWAY_OPS_PORT"}
DEVELOPMENT_VARIABLES = {setting.name for setting in SETTINGS if setting.scope is Scope.DEVELOPMENT}
SECRETS = {setting.name for setting in SETTINGS if setting.is_secret} - DEVELOPMENT_VARIABLES


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("api.replica=3", "replica"),
        ("api.replicas=0", "api.replicas"),
        ("settings.leaseSeconds=5", "settings.leaseSeconds"),
        ('settings.logLevel="loud"', "settings.logLevel"),
        ('settings.models={"anime":"x"}', "settings.models"),
        ('settings.upstreamUrl="upstream.example"', "settings.upstreamUrl"),
        ('settings.upstreamUrl=""', "settings.upstreamUrl"),
        ('image.repository=""', "image.repository"),
        ('image.digest="latest"', "image.digest"),
        ('secrets.redisUrl.value="redis://x"', "secrets.redisUrl"),
        ('extraEnv=[{"name":"GATEWAY_ROLE","value":"all"}]', "GATEWAY_ROLE"),
        ('api.podLabels={"app.kubernetes.io/name":"x"}', "api.podLabels"),
        ("api.autoscaling.minReplicas=9", "api.autoscaling.minReplicas"),
        ("networkPolicy.redis.ports=[]", "networkPolicy.redis.ports"),
        ('settings.upstreamUrl="https://[::1]:8443/x"', "networkPolicy.upstream.ports must have 8443"),
        ('settings.upstreamUrl="http://upstream.example"', "networkPolicy.upstream.ports must have 80"),
        ("networkPolicy.tenants=[{}]", "networkPolicy.tenants.0"),
        ("ingress.enabled=true", "ingress.hosts"),
        ("monitoring.serviceMonitor.enabled=true", "networkPolicy.operators"),
        ("registry.enabled=true", "existingConfigMap"),
        ('registry={"enabled":true,"toml":"x","existingConfigMap":"x"}', "existingConfigMap"),
        (
            'registry={"secretEnv":[{"name":"GATEWAY_ADMIN_TOKEN","existingSecret":"x","key":"x"}]}',
            "GATEWAY_ADMIN_TOKEN",
        ),
    ],
)
def test_errors(setting: str, place: str) -> None:
    """Invalid values fail with an error that names the place."""
    with pytest.raises(HelmError, match=re.escape(place)):
        render(EXAMPLES["default"], setting)


@pytest.mark.parametrize(
    "policy",
    [
        {"upstream": {"ports": [443, 8443]}},
        {"upstream": {"ports": [9000], "to": []}},
        {"extraEgress": [{"ports": [{"port": 8443}]}]},
        {"enabled": False},
    ],
)
def test_upstream_on_another_port(policy: object) -> None:
    """An upstream on another port is accepted if a policy allows it."""
    port, allowed = 'settings.upstreamUrl="https://upstream.example:8443"', f"networkPolicy={json.dumps(policy)}"
    assert render_release("default", port, allowed)


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
    (root, *nested) = pair_keys(VALUES, SCHEMA)
    assert root[1] - root[0] == {"global"}
    missing = [known - there for there, known in nested if known != there]
    assert missing == [set(SCHEMA["properties"]["settings"]["properties"]) - VALUES["settings"].keys()]


def variable_name(key: str) -> str:
    """Return the variable of a key of `settings`."""
    return "GATEWAY_" + re.sub(r"([A-Z])", r"_\1", key).upper()


def test_every_setting() -> None:
    """Every setting belongs to the values, a Secret, the chart or development; defaults are those of the gateway."""
    output = {variable_name(key) for key in SCHEMA["properties"]["settings"]["properties"]}
    mounted = {variable_name(key) for key in SCHEMA["properties"]["secrets"]["properties"]}
    groups = [output, mounted, CHART_VARIABLES, DEVELOPMENT_VARIABLES]
    assert mounted == SECRETS
    assert sorted(name for group in groups for name in group) == sorted(setting.name for setting in SETTINGS)
    defaults = {variable_name(key): str(value) for key, value in VALUES["settings"].items() if value}
    own = {setting.name: setting.default for setting in SETTINGS}
    assert defaults == {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_LEASE_SECONDS": own["GATEWAY_LEASE_SECONDS"]}


def is_valid_setting(key: str, value: object) -> bool:
    try:
        Settings.load({variable_name(key): str(value)})
    except SettingsError:
        return False
    return True


def test_ranges() -> None:
    """The schema has the gateway's ranges of numbers and its choices."""
    properties = SCHEMA["properties"]["settings"]["properties"]
    for key in ("logLevel", "upstreamCleartext"):
        assert [word for word in properties[key]["enum"] if not is_valid_setting(key, word)] == []
    bounded = {key: item for key, item in properties.items() if "minimum" in item}
    assert len(bounded) == 6
    for key, item in bounded.items():
        step = 1 if item["type"] == "integer" else 0.01
        least, most = item["minimum"], item["maximum"]
        assert [is_valid_setting(key, value) for value in (least, most)] == [True, True], key
        assert [is_valid_setting(key, value) for value in (least - step, most + step)] == [False, False], key


def test_extras(tmp_path: Path) -> None:
    """Additional variables and volumes apply to both roles, node selectors and labels to one."""
    resources = render_release(
        "default",
        'extraEnv=[{"name":"OTEL_RESOURCE_ATTRIBUTES","value":"team=images"}]',
        'extraVolumes=[{"name":"ca","configMap":{"name":"ca"}}]',
        'extraVolumeMounts=[{"name":"ca","mountPath":"/etc/ca"}]',
        'worker.nodeSelector={"disk":"ssd"}',
        'worker.tolerations=[{"key":"images","operator":"Exists"}]',
        'worker.affinity={"nodeAffinity":{}}',
        'worker.podLabels={"team":"images"}',
        "serviceAccount.create=false",
        'serviceAccount.name="theirs"',
    )
    assert "ServiceAccount" not in {resource["kind"] for resource in resources}
    for _, pod in pod_templates(resources):
        (container,) = pod["spec"]["containers"]
        environment = pod_environment(pod, tmp_path, REDIS_URLS["default"])
        assert environment["OTEL_RESOURCE_ATTRIBUTES"] == "team=images"
        assert {"name": "ca", "mountPath": "/etc/ca"} in container["volumeMounts"]
        assert {"name": "ca", "configMap": {"name": "ca"}} in pod["spec"]["volumes"]
        assert pod["spec"]["serviceAccountName"] == "theirs"
    worker = get_resource(resources, "Deployment", "-worker")["spec"]["template"]
    assert worker["metadata"]["labels"]["team"] == "images"
    assert worker["spec"]["nodeSelector"] == {"disk": "ssd"}
    assert worker["spec"]["tolerations"] == [{"key": "images", "operator": "Exists"}]
    assert worker["spec"]["affinity"] == {"nodeAffinity": {}}
    api = get_resource(resources, "Deployment", "-api")["spec"]["template"]
    assert not api["spec"].keys() & {"nodeSelector", "tolerations", "affinity"}
