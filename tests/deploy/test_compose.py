"""The compose file, checked without an engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from click.testing import CliRunner

from service.cli import main
from service.devstack import SANDBOX_USER_KEY
from service.settings import Role, Settings
from service.storage.connections import check_server
from tests.deploy.compose import (
    FILE,
    ROOT,
    UPSTREAM,
    MissingVariableError,
    container_settings,
    interpolate,
    load_compose,
)
from tests.deploy.rules import alerts
from tests.support.valkey import run_valkey

REQUIRED_VARIABLES = {
    "GATEWAY_UPSTREAM_URL": "https://images.example",
    "GATEWAY_UPSTREAM_USER_KEY": "the-key-of-the-account",
}
GATEWAY_ROLES = {"gateway": Role.API, "worker": Role.WORKER}
DEPLOY = FILE.parent
SERVICES: Mapping[str, Any] = load_compose()["services"]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text("utf-8"))


def list_mounts(service: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for volume in service.get("volumes", ()):
        source, target = volume.split(":")[:2]
        yield source, target


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", "a"), ("${A:-x}${B:-y}", "1y"), ("${B:-x${A:?no}z}", "x1z"), ("-${A}-", "-1-")],
)
def test_interpolation(text: str, expected: str) -> None:
    """Interpolation follows compose."""
    assert interpolate(text, {"A": "1"}) == expected


def test_settings() -> None:
    """Each gateway container has valid settings, and uses the sandbox."""
    for name, role in GATEWAY_ROLES.items():
        settings = Settings.load(container_settings(SERVICES[name]))
        assert (settings.role, settings.redis_url, settings.ops_host) == (role, "redis://store:6379", "0.0.0.0")
        assert (settings.port, settings.ops_port) == (8080, 8081)
        assert (settings.upstream_url, settings.upstream_user_key) == ("http://sandbox:8082", SANDBOX_USER_KEY)


def test_real_upstream() -> None:
    """Two variables select the real upstream for both roles, without the sandbox."""
    services = load_compose(UPSTREAM, **REQUIRED_VARIABLES)["services"]
    for name, role in GATEWAY_ROLES.items():
        result = Settings.load(container_settings(services[name]))
        assert (result.role, result.redis_url) == (role, "redis://store:6379")
        assert {
            "GATEWAY_UPSTREAM_URL": result.upstream_url,
            "GATEWAY_UPSTREAM_USER_KEY": result.upstream_user_key,
        } == REQUIRED_VARIABLES
        assert services[name]["depends_on"]["sandbox"]["required"] is False
    assert services["sandbox"]["profiles"] == ["sandbox"]
    assert {name for name, service in services.items() if "profiles" in service} == {"sandbox"}


@pytest.mark.parametrize("name", REQUIRED_VARIABLES)
def test_real_upstream_needs_both(name: str) -> None:
    """Without one of the variables compose fails and names it."""
    value = {other: text for other, text in REQUIRED_VARIABLES.items() if other != name}
    with pytest.raises(MissingVariableError, match=rf"^required variable {name} is missing a value: the "):
        load_compose(UPSTREAM, **value)


def test_sandbox() -> None:
    """The sandbox listens where the gateway calls it, and its command exists."""
    words = SERVICES["sandbox"]["command"]
    assert CliRunner().invoke(main, [words[0], "--help"]).exit_code == 0
    assert words[words.index("--port") + 1] == "8082"
    assert words[words.index("--host") + 1] == "0.0.0.0"


@pytest.mark.parametrize("name", SERVICES)
def test_confined(name: str) -> None:
    """No container runs as root, gains privileges or writes to its root; each has a health check."""
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid"}
    assert name in GATEWAY_ROLES or service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_pinned(name: str) -> None:
    """Each image has a version and can be overridden; ours is built from this repository."""
    assert not SERVICES[name]["image"].endswith(":latest")
    assert re.fullmatch(r"[a-z/-]+:[\w.-]+", SERVICES[name]["image"])
    raw = yaml.safe_load(FILE.read_text("utf-8"))["services"][name]
    assert re.match(r"\$\{[A-Z_]+:-", raw["image"])
    if "build" in raw:
        assert (DEPLOY / raw["build"]["context"]).resolve() == ROOT


def test_ports() -> None:
    """Every port is published on localhost only, and ports are unique."""
    ports = [port.split(":") for service in SERVICES.values() for port in service.get("ports", ())]
    assert {address for address, _, _ in ports} == {"127.0.0.1"}
    assert len({published for _, published, _ in ports}) == len(ports)


def test_store_network() -> None:
    """The store shares an internal network with the gateway only."""
    inside = {name for name, service in SERVICES.items() if "store" in service["networks"]}
    assert inside == {"store", *GATEWAY_ROLES}
    assert SERVICES["store"]["networks"] == ["store"]
    assert load_compose()["networks"]["store"] == {"internal": True}


def test_mounts() -> None:
    """Every mount exists and is read-only; every volume is declared and used."""
    used = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source, *rest = volume.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).is_dir()
                assert rest[-1] == "ro"
            else:
                used.add(source)
    assert used == set(load_compose()["volumes"])


async def test_store_options() -> None:
    """The store's options pass the check of stores without a warning."""
    program, *options = SERVICES["store"]["command"]
    place = options.index("--dir")
    assert program == "valkey-server"
    assert options[place + 1] in dict(list_mounts(SERVICES["store"])).values()
    with run_valkey(*options[:place], *options[place + 2 :]) as store:
        result = await check_server(store.url, "gw", timeout=5)
    assert (result.errors, result.warnings) == ([], [])


def test_prometheus() -> None:
    """Targets and the Alertmanager of Prometheus are services of the file."""
    config = read_yaml("prometheus/prometheus.yaml")
    (names,) = [dns_sd_config["names"] for job in config["scrape_configs"] for dns_sd_config in job["dns_sd_configs"]]
    assert names == ["gateway"]
    assert SERVICES["worker"]["networks"]["monitoring"]["aliases"] == names
    result = [
        target
        for alertmanager in config["alerting"]["alertmanagers"]
        for target in alertmanager["static_configs"][0]["targets"]
    ]
    assert result == ["alertmanager:9093"]
    for name in ("gateway", "worker", "prometheus", "alertmanager", "grafana"):
        assert "monitoring" in SERVICES[name]["networks"]


@pytest.mark.parametrize("name", ["prometheus", "alertmanager"])
def test_configuration_files(name: str) -> None:
    """Each configuration file is mounted where its program reads it."""
    (file,) = [word.partition("=")[2] for word in SERVICES[name]["command"] if word.startswith("--config.file=")]
    folders = {target: source for source, target in list_mounts(SERVICES[name])}
    assert (DEPLOY / folders[str(Path(file).parent)] / Path(file).name).exists()


def test_grafana() -> None:
    """Grafana is provisioned with Prometheus and the dashboards."""
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    address = urlsplit(source["url"])
    assert (source["type"], source["isDefault"], address.hostname, address.port) == (
        "prometheus",
        True,
        "prometheus",
        9090,
    )
    assert source["jsonData"]["timeInterval"] == read_yaml("prometheus/prometheus.yaml")["global"]["scrape_interval"]
    (provider,) = read_yaml("grafana/provisioning/dashboards/gateway.yaml")["providers"]
    folders = {target: source for source, target in list_mounts(SERVICES["grafana"])}
    dashboards = DEPLOY / folders[provider["options"]["path"]]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert json.loads((dashboards / home.name).read_text("utf-8"))["uid"] == "gateway-service"
    assert folders["/etc/grafana/provisioning"] == "./grafana/provisioning"


def test_receivers() -> None:
    """Each alert has a receiver named after its severity."""
    config = read_yaml("alertmanager/alertmanager.yaml")
    routes = {tuple(route["matchers"]): route["receiver"] for route in config["route"]["routes"]}
    severities = {alert["labels"]["severity"] for alert in alerts()}
    assert routes == {(f'severity="{severity}"',): severity for severity in severities}
    assert {receiver["name"] for receiver in config["receivers"]} == severities


def test_inhibitions() -> None:
    """Inhibition rules name existing alerts, and only GatewayAbsent mutes a page."""
    names = {alert["alert"] for alert in alerts()}
    for rule in read_yaml("alertmanager/alertmanager.yaml")["inhibit_rules"]:
        matchers = [*rule["source_matchers"], *rule["target_matchers"]]
        for pattern in re.findall(r'alertname!?=~?"(.+)"', "\n".join(matchers)):
            for part in pattern.split("|"):
                assert [name for name in names if re.fullmatch(part, name)], part
        assert "namespace" in rule["equal"]
        ours = [matcher for matcher in rule["target_matchers"] if re.fullmatch(r'alertname=~?"Gateway.+"', matcher)]
        assert ours or "alertname" in rule["equal"]
        assert 'severity="ticket"' in rule["target_matchers"] or rule["source_matchers"] == [
            'alertname="GatewayAbsent"'
        ]


def test_build_arguments() -> None:
    known = set(re.findall(r"^ARG (\w+)", (DEPLOY.parent / "Dockerfile").read_text("utf-8"), re.MULTILINE))
    value = {name for service in SERVICES.values() for name in service.get("build", {}).get("args", {})}
    assert value
    assert value <= known
