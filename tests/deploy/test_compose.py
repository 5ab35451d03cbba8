"""The compose file, as far as it can be judged without an engine."""

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
    """What is mounted, and where."""
    for volume in service.get("volumes", ()):
        source, target = volume.split(":")[:2]
        yield source, target


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a", "a"), ("${A:-x}${B:-y}", "1y"), ("${B:-x${A:?no}z}", "x1z"), ("-${A}-", "-1-")],
)
def test_interpolation(text: str, wanted: str) -> None:
    """Variables are put in as compose does it, so that the other tests mean something."""
    assert interpolate(text, {"A": "1"}) == wanted


def test_the_settings_are_good() -> None:
    """Each container of the gateway has settings that it takes, and spends the sandbox's money."""
    for name, role in GATEWAY_ROLES.items():
        found = Settings.load(container_settings(SERVICES[name]))
        assert (found.role, found.redis_url, found.ops_host) == (role, "redis://store:6379", "0.0.0.0")
        assert (found.port, found.ops_port) == (8080, 8081)
        assert (found.upstream_url, found.upstream_user_key) == ("http://sandbox:8082", SANDBOX_USER_KEY)


def test_the_real_upstream() -> None:
    """With two variables it is the real upstream, for both roles, and no sandbox is started or waited for."""
    services = load_compose(UPSTREAM, **REQUIRED_VARIABLES)["services"]
    for name, role in GATEWAY_ROLES.items():
        found = Settings.load(container_settings(services[name]))
        assert (found.role, found.redis_url) == (role, "redis://store:6379")
        assert {
            "GATEWAY_UPSTREAM_URL": found.upstream_url,
            "GATEWAY_UPSTREAM_USER_KEY": found.upstream_user_key,
        } == REQUIRED_VARIABLES
        assert services[name]["depends_on"]["sandbox"]["required"] is False
    assert services["sandbox"]["profiles"] == ["sandbox"]
    assert {name for name, service in services.items() if "profiles" in service} == {"sandbox"}


@pytest.mark.parametrize("name", REQUIRED_VARIABLES)
def test_the_real_upstream_needs_both(name: str) -> None:
    """Without one of the variables compose refuses, and says what is missing."""
    given = {other: text for other, text in REQUIRED_VARIABLES.items() if other != name}
    with pytest.raises(MissingVariableError, match=rf"^required variable {name} is missing a value: the "):
        load_compose(UPSTREAM, **given)


def test_the_sandbox_is_where_it_is_looked_for() -> None:
    """The sandbox listens, with a command that exists, where the gateway calls it."""
    words = SERVICES["sandbox"]["command"]
    assert CliRunner().invoke(main, [words[0], "--help"]).exit_code == 0
    assert words[words.index("--port") + 1] == "8082"
    assert words[words.index("--host") + 1] == "0.0.0.0"


@pytest.mark.parametrize("name", SERVICES)
def test_confined(name: str) -> None:
    """No container is root, can become more than it is, or can write to its root; each is asked whether it lives."""
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid"}
    assert name in GATEWAY_ROLES or service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_pinned(name: str) -> None:
    """Each image has a version, and can be replaced by a variable; ours are built from this repository."""
    assert not SERVICES[name]["image"].endswith(":latest")
    assert re.fullmatch(r"[a-z/-]+:[\w.-]+", SERVICES[name]["image"])
    raw = yaml.safe_load(FILE.read_text("utf-8"))["services"][name]
    assert re.match(r"\$\{[A-Z_]+:-", raw["image"])
    if "build" in raw:
        assert (DEPLOY / raw["build"]["context"]).resolve() == ROOT


def test_nobody_else_is_listened_to() -> None:
    """Every port is one of this machine alone, and no two are the same."""
    ports = [port.split(":") for service in SERVICES.values() for port in service.get("ports", ())]
    assert {address for address, _, _ in ports} == {"127.0.0.1"}
    assert len({published for _, published, _ in ports}) == len(ports)


def test_only_the_gateway_reaches_the_store() -> None:
    """The store is in a network without a way out, with the gateway alone."""
    inside = {name for name, service in SERVICES.items() if "store" in service["networks"]}
    assert inside == {"store", *GATEWAY_ROLES}
    assert SERVICES["store"]["networks"] == ["store"]
    assert load_compose()["networks"]["store"] == {"internal": True}


def test_what_is_mounted_is_there() -> None:
    """Every mounted file or folder exists and can't be written to; every volume is declared and used."""
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


async def test_the_store_keeps_what_it_is_told() -> None:
    """A server with the store's own options passes the check of stores without a doubt."""
    program, *options = SERVICES["store"]["command"]
    place = options.index("--dir")
    assert program == "valkey-server"
    assert options[place + 1] in dict(list_mounts(SERVICES["store"])).values()
    with run_valkey(*options[:place], *options[place + 2 :]) as store:
        found = await check_server(store.url, "gw", timeout=5)
    assert (found.errors, found.warnings) == ([], [])


def test_prometheus_finds_everybody() -> None:
    """What Prometheus asks, and whom it tells, are services of the file, under names that it can look up."""
    config = read_yaml("prometheus/prometheus.yaml")
    (names,) = [each["names"] for job in config["scrape_configs"] for each in job["dns_sd_configs"]]
    assert names == ["gateway"]
    assert SERVICES["worker"]["networks"]["watch"]["aliases"] == names
    told = [target for each in config["alerting"]["alertmanagers"] for target in each["static_configs"][0]["targets"]]
    assert told == ["alertmanager:9093"]
    for name in ("gateway", "worker", "prometheus", "alertmanager", "grafana"):
        assert "watch" in SERVICES[name]["networks"]


@pytest.mark.parametrize("name", ["prometheus", "alertmanager"])
def test_configurations_are_where_they_are_looked_for(name: str) -> None:
    """The file that a program is told to read is mounted there."""
    (file,) = [word.partition("=")[2] for word in SERVICES[name]["command"] if word.startswith("--config.file=")]
    folders = {target: source for source, target in list_mounts(SERVICES[name])}
    assert (DEPLOY / folders[str(Path(file).parent)] / Path(file).name).exists()


def test_grafana_is_provisioned() -> None:
    """Grafana has Prometheus as its data source, and reads the dashboards from where they are mounted."""
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


def test_every_severity_has_a_receiver() -> None:
    """Each alert is sent to the receiver that is named as its severity."""
    config = read_yaml("alertmanager/alertmanager.yaml")
    routes = {tuple(route["matchers"]): route["receiver"] for route in config["route"]["routes"]}
    severities = {alert["labels"]["severity"] for alert in alerts()}
    assert routes == {(f'severity="{severity}"',): severity for severity in severities}
    assert {each["name"] for each in config["receivers"]} == severities


def test_inhibitions_are_of_alerts_that_exist() -> None:
    """Each rule that mutes alerts names some of ours and no others', and a page is muted by GatewayAbsent alone."""
    names = {alert["alert"] for alert in alerts()}
    for rule in read_yaml("alertmanager/alertmanager.yaml")["inhibit_rules"]:
        matchers = [*rule["source_matchers"], *rule["target_matchers"]]
        for pattern in re.findall(r'alertname!?=~?"(.+)"', "\n".join(matchers)):
            for part in pattern.split("|"):
                assert [name for name in names if re.fullmatch(part, name)], part
        assert "namespace" in rule["equal"]
        ours = [each for each in rule["target_matchers"] if re.fullmatch(r'alertname=~?"Gateway.+"', each)]
        assert ours or "alertname" in rule["equal"]
        assert 'severity="ticket"' in rule["target_matchers"] or rule["source_matchers"] == [
            'alertname="GatewayAbsent"'
        ]


def test_build_arguments_exist() -> None:
    """The Dockerfile knows every argument that an image is built with."""
    known = set(re.findall(r"^ARG (\w+)", (DEPLOY.parent / "Dockerfile").read_text("utf-8"), re.MULTILINE))
    given = {name for service in SERVICES.values() for name in service.get("build", {}).get("args", {})}
    assert given
    assert given <= known
