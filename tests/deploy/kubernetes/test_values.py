"""The values of the chart, and errors for invalid ones."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from deploy.helm.chart import CHART, EXAMPLES, HelmError, render
from service.settings import SETTINGS, Scope, Settings, SettingsError
from tests.deploy.kubernetes.release import ROLES, get_resource, render_release, resources_of_kind

SCHEMA: Any = json.loads((CHART / "values.schema.json").read_text("utf-8"))
VALUES: Any = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
CHART_VARIABLES = {"GATEWAY_ENV", "GATEWAY_ROLE", "GATEWAY_PORT", "GATEWAY_OPS_HOST", "GATEWAY_OPS_PORT"}
DEVELOPMENT_VARIABLES = {setting.name for setting in SETTINGS if setting.scope is Scope.DEVELOPMENT}
SECRETS = {setting.name for setting in SETTINGS if setting.is_secret} - DEVELOPMENT_VARIABLES


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("api.replica=3", "replica"),
        ("settings.leaseSeconds=5", "settings.leaseSeconds"),
        ('settings.models={"anime":"x"}', "settings.models"),
        ('settings.upstreamUrl="upstream.example"', "settings.upstreamUrl"),
        ('image.digest="latest"', "image.digest"),
        ('secrets.redisUrl.value="redis://x"', "secrets.redisUrl"),
        ('extraEnv=[{"name":"GATEWAY_ROLE","value":"all"}]', "GATEWAY_ROLE"),
        ('api.podLabels={"app.kubernetes.io/name":"x"}', "api.podLabels"),
        ("api.autoscaling.minReplicas=9", "api.autoscaling.minReplicas"),
        ('settings.upstreamUrl="https://[::1]:8443/x"', "networkPolicy.upstream.ports must have 8443"),
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


def test_upstream_on_another_port() -> None:
    """An upstream on another port is accepted if a policy allows it, or there is none."""
    port = 'settings.upstreamUrl="https://upstream.example:8443"'
    for policy in ('"upstream":{"ports":[8443]}', '"extraEgress":[{"ports":[{"port":8443}]}]', '"enabled":false'):
        assert render_release("default", port, f"networkPolicy={{{policy}}}")


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
    for key in ("logLevel", "playground", "upstreamCleartext"):
        assert all(is_valid_setting(key, word) for word in properties[key]["enum"])
    bounded = {key: item for key, item in properties.items() if "minimum" in item}
    assert bounded
    for key, item in bounded.items():
        step, least, most = 1 if item["type"] == "integer" else 0.01, item["minimum"], item["maximum"]
        validity = [is_valid_setting(key, value) for value in (least - step, least, most, most + step)]
        assert validity == [False, True, True, False], key


def test_extras() -> None:
    """Additional variables apply to both roles, node selectors and labels to one."""
    own = {"nodeSelector": {"disk": "ssd"}, "tolerations": [{"key": "images"}], "affinity": {"nodeAffinity": {}}}
    resources = render_release(
        "default",
        'extraEnv=[{"name":"OTEL_RESOURCE_ATTRIBUTES","value":"team=images"}]',
        f"worker={json.dumps(own)}",
        'worker.podLabels={"team":"images"}',
        "serviceAccount.create=false",
        'serviceAccount.name="theirs"',
    )
    assert resources_of_kind(resources, "ServiceAccount") == []
    api, worker = (get_resource(resources, "Deployment", f"-{role}")["spec"]["template"] for role in ROLES)
    for pod in (api, worker):
        (container,) = pod["spec"]["containers"]
        assert {"name": "OTEL_RESOURCE_ATTRIBUTES", "value": "team=images"} in container["env"]
        assert pod["spec"]["serviceAccountName"] == "theirs"
    assert worker["metadata"]["labels"]["team"] == "images"
    assert own.items() <= worker["spec"].items()
    assert not api["spec"].keys() & own.keys()
