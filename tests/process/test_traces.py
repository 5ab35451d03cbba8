"""Traces of `gateway serve`, for those who want them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.process.gateway import command, environment, serving, until
from tests.support.traces import collecting
from tests.support.valkey import free_port

WATCHED_IMPORTS = """
import sys
from pathlib import Path

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("service.telemetry.tracing_otel", "requests")):
            Path(MARK).touch()
        if name.partition(".")[0] in {"opentelemetry", "requests"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Watch())
"""


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python without OpenTelemetry, for which redis-py looks too; what is ours leaves a mark."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCHED_IMPORTS.replace("MARK", repr(str(tmp_path / "mark"))))
    return {"PYTHONPATH": str(folder)}


def test_followed(tmp_path: Path) -> None:
    """A task is followed from its submission over its checks, and what was recorded last is sent at the end."""
    with collecting() as collector:
        with serving(tmp_path, GATEWAY_SANDBOX_PORT="0", GATEWAY_TRACES_URL=collector.url) as gateway:
            answer = gateway.tried()
            assert answer.status_code == 201, answer.text
            gateway.finished(answer.json()["links"]["self"])
            until(lambda: bool(collector.spans), "what is sent before the end")
            assert gateway.end() == 0
        request = collector.one("POST /v1/tasks/upscale")
        assert request.resource["service.name"] == "imaging-gateway"
        checks = collector.all("check task")
        assert checks
        assert {link for check in checks for link in check.links} == {(request.trace, request.id)}
        assert gateway.token.encode() not in b"".join(collector.bodies)
        log = gateway.log.read_text()
        assert f"trace_id={request.trace}" in log
        assert "traces." not in log


def test_collector_away(tmp_path: Path) -> None:
    """A gateway whose collector is away serves as ever, says so in few words, and ends soon."""
    with serving(tmp_path, GATEWAY_SANDBOX_PORT="0", GATEWAY_TRACES_URL=f"http://127.0.0.1:{free_port()}") as gateway:
        answer = gateway.tried()
        assert answer.status_code == 201, answer.text
        gateway.finished(answer.json()["links"]["self"])
        until(lambda: "traces.troubled" in gateway.log.read_text(), "a line in the log")
        assert gateway.end() == 0
    log = gateway.log.read_text()
    assert "Traceback" not in log
    assert log.count("traces.") < 5


def test_not_wanted(tmp_path: Path, without: dict[str, str]) -> None:
    """Without a collector nothing of what sends traces is loaded, and OpenTelemetry need not be installed."""
    with serving(tmp_path / "data", GATEWAY_SANDBOX_PORT="0", **without) as gateway:
        answer = gateway.tried()
        assert answer.status_code == 201, answer.text
        gateway.finished(answer.json()["links"]["self"])
        assert gateway.end() == 0
    assert not (tmp_path / "mark").exists()


def test_not_installed(tmp_path: Path, without: dict[str, str]) -> None:
    """With a collector but without OpenTelemetry the gateway does not start, and says what to install."""
    env = environment(tmp_path / "data", GATEWAY_TRACES_URL="http://127.0.0.1:4318", **without)
    done = subprocess.run(command("serve"), env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "GATEWAY_TRACES_URL" in done.stderr
    assert "pip install 'imaging-gateway[otel]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "value"),
    [("GATEWAY_TRACES_URL", "collector:4318"), ("GATEWAY_TRACES_SHARE", "2"), ("GATEWAY_TRACES_SHARE", "some")],
)
def test_unusable(tmp_path: Path, setting: str, value: str) -> None:
    """A setting that can't be used is refused with what it must be."""
    env = environment(tmp_path, **{setting: value})
    done = subprocess.run(command("serve"), env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert f"{setting} must be" in done.stderr
