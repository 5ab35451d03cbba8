"""The compose files, checked without an engine."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.crypto import generate_secret_key
from service.devstack import SANDBOX_USER_KEY
from service.setting_types import Role
from service.settings import Settings
from service.storage.connections import check_server
from tests.deploy.queries import ALERTS, DEPLOY
from tests.support.valkey import run_valkey

ROOT = DEPLOY.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
UPSTREAM_VARIABLES = {
    "GATEWAY_UPSTREAM_URL": "https://images.example",
    "GATEWAY_SECRET_KEYS": generate_secret_key(),
    "GATEWAY_ADMIN_TOKEN": secrets.token_hex(32),
}
GATEWAY_ROLES = {"gateway": Role.API, "worker": Role.WORKER}


def load_compose(name: str, **environ: str) -> Any:
    """Load a compose file with `${NAME:-default}` and `${NAME:?error}` replaced; a missing variable is a KeyError."""

    def replace(found: re.Match[str]) -> str:
        name, how, default = found.groups()
        return environ.get(name, default) if how == ":-" else environ[name]

    text = (DEPLOY / name).read_text("utf-8")
    return yaml.safe_load(re.sub(r"\$\{(\w+)(:[-?])(.*?)\}", replace, text))


COMPOSE = load_compose("compose.yaml")
SERVICES: Mapping[str, Any] = COMPOSE["services"]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text("utf-8"))


def mounts(name: str) -> Mapping[str, str]:
    """Return the folders and volumes of a container by the place where they are mounted."""
    volumes = [volume.split(":") for volume in SERVICES[name].get("volumes", ())]
    return {target: source for source, target, *_ in volumes}


def gateway_settings(name: str, environment: Mapping[str, str]) -> Settings:
    """Return the settings of a container: those of the image, overridden by its environment."""
    settings = Settings.load({**dict(re.findall(r"(GATEWAY_\w+)=(\S+)", DOCKERFILE)), **environment})
    assert (settings.role, settings.redis_url) == (GATEWAY_ROLES[name], "redis://store:6379")
    assert (settings.ops_host, settings.port, settings.ops_port) == ("0.0.0.0", 8080, 8081)
    return settings


@pytest.mark.parametrize("name", GATEWAY_ROLES)
def test_settings(name: str) -> None:
    """Each gateway uses the sandbox, or with three variables, all required, the real upstream in production."""
    settings = gateway_settings(name, SERVICES[name]["environment"])
    assert (settings.upstream_url, settings.upstream_user_key) == ("http://sandbox:8082", SANDBOX_USER_KEY)
    assert SERVICES["sandbox"]["command"][:5] == ["sandbox", "--host", "0.0.0.0", "--port", "8082"]
    services = load_compose("compose.upstream.yaml", **UPSTREAM_VARIABLES)["services"]
    settings = gateway_settings(name, SERVICES[name]["environment"] | services[name]["environment"])
    assert settings.is_production
    assert (settings.upstream_url, settings.upstream_user_key) == ("https://images.example", None)
    token = None if settings.role is Role.WORKER else UPSTREAM_VARIABLES["GATEWAY_ADMIN_TOKEN"]
    assert (settings.admin_token, len(settings.secret_keys)) == (token, 1)
    assert SERVICES[name]["depends_on"]["sandbox"]["required"] is False
    assert services["sandbox"] == {"profiles": ["sandbox"]}
    for missing in UPSTREAM_VARIABLES:
        with pytest.raises(KeyError, match=missing):
            load_compose("compose.upstream.yaml", **{name: "x" for name in UPSTREAM_VARIABLES if name != missing})


@pytest.mark.parametrize("name", SERVICES)
def test_confined(name: str) -> None:
    """No container runs as root, gains privileges or writes to its root; its image has a version and a health check."""
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"] == {"core": 0}
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid"}
    assert re.fullmatch(r"[a-z/-]+:(?!latest)[\w.-]+", service["image"])
    assert name in GATEWAY_ROLES or service["healthcheck"]["test"][0] == "CMD"  # the gateway's is in the image
    if build := service.get("build"):
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert build["args"].keys() <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def test_images_by_digest() -> None:
    """Every image of the compose files and the Dockerfile is an argument, which may be a digest."""
    digest = f"registry.example/some/image@sha256:{'0' * 64}"
    variables = dict.fromkeys(re.findall(r"\$\{(\w+_IMAGE):-", (DEPLOY / "compose.yaml").read_text("utf-8")), digest)
    services = load_compose("compose.yaml", **variables)["services"].values()
    builds = [service["build"]["args"]["PYTHON_IMAGE"] for service in services if "build" in service]
    assert {*(service["image"] for service in services), *builds} == {digest}
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${PYTHON_IMAGE}"}


def test_networks() -> None:
    """Ports are published on localhost only, and the store shares an internal network with the gateway only."""
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert {name for name, service in SERVICES.items() if "store" in service["networks"]} == {"store", *GATEWAY_ROLES}
    assert SERVICES["store"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"] == {"internal": True}


def test_mounts() -> None:
    """Every mounted folder exists and is read-only; every volume is declared and used."""
    volumes = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", ())]
    for source, *rest in volumes:
        assert not source.startswith(".") or ((DEPLOY / source).is_dir() and rest[-1] == "ro")
    assert {source for source, *_ in volumes if not source.startswith(".")} == set(COMPOSE["volumes"])


async def test_store_options() -> None:
    """The store's options pass the check of stores without a warning."""
    program, *options = SERVICES["store"]["command"]
    place = options.index("--dir")
    assert program == "valkey-server"
    assert options[place + 1] in mounts("store")
    with run_valkey(*options[:place], *options[place + 2 :]) as store:
        result = await check_server(store.url, "gw", timeout=5)
    assert (result.errors, result.warnings) == ([], [])


def test_prometheus() -> None:
    """Prometheus finds both gateways under one name and the Alertmanager; the configuration files are mounted."""
    config = read_yaml("prometheus/prometheus.yaml")
    assert [job["dns_sd_configs"][0]["names"] for job in config["scrape_configs"]] == [["gateway"]]
    assert SERVICES["worker"]["networks"]["monitoring"]["aliases"] == ["gateway"]
    assert config["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]
    for name in ("prometheus", "alertmanager"):
        (file,) = re.findall(r"--config\.file=(\S+)", " ".join(SERVICES[name]["command"]))
        assert (DEPLOY / mounts(name)[str(Path(file).parent)] / Path(file).name).exists()
    for name in (*GATEWAY_ROLES, "prometheus", "alertmanager", "grafana"):
        assert "monitoring" in SERVICES[name]["networks"]


def test_grafana() -> None:
    """Grafana is provisioned with Prometheus and the dashboards."""
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    assert source["jsonData"]["timeInterval"] == read_yaml("prometheus/prometheus.yaml")["global"]["scrape_interval"]
    (provider,) = read_yaml("grafana/provisioning/dashboards/gateway.yaml")["providers"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    folders = mounts("grafana")
    assert folders["/etc/grafana/provisioning"] == "./grafana/provisioning"
    assert folders[provider["options"]["path"]] == "./grafana/dashboards"
    assert (DEPLOY / folders[str(home.parent)] / home.name).exists()


def test_alertmanager() -> None:
    """Each severity has its receiver; inhibitions name existing alerts, and only GatewayAbsent mutes a page."""
    config = read_yaml("alertmanager/alertmanager.yaml")
    severities = {alert["labels"]["severity"] for alert in ALERTS}
    routes = {tuple(route["matchers"]): route["receiver"] for route in config["route"]["routes"]}
    assert routes == {(f'severity="{severity}"',): severity for severity in severities}
    assert {receiver["name"] for receiver in config["receivers"]} == severities
    names = {alert["alert"] for alert in ALERTS}
    for rule in config["inhibit_rules"]:
        source, target = rule["source_matchers"], rule["target_matchers"]
        for pattern in re.findall(r'alertname!?=~?"(.+)"', "\n".join([*source, *target])):
            assert all(any(re.fullmatch(part, name) for name in names) for part in pattern.split("|")), pattern
        assert "namespace" in rule["equal"]
        assert "alertname" in rule["equal"] or any(re.fullmatch(r'alertname=~?"Gateway.+"', item) for item in target)
        assert 'severity="ticket"' in target or source == ['alertname="GatewayAbsent"']
