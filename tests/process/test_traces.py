"""Traces of `gateway serve`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.process.gateway import gateway_command, gateway_environment, run_gateway, wait_until
from tests.support.network import reserve_port
from tests.support.traces import run_collector

IMPORT_HOOK = """
import sys
from pathlib import Path

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("service.telemetry.tracing_otel", "requests")):
            Path(MARK).touch()
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "requests")):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Watch())
"""


@pytest.fixture
def env_without_extra(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a Python without the extra, in which importing what needs it leaves a file."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(IMPORT_HOOK.replace("MARK", repr(str(tmp_path / "mark"))))
    return {"PYTHONPATH": str(folder)}


def test_task_is_traced(tmp_path: Path) -> None:
    """A task is traced from submission to checks, and the last spans are sent at shutdown."""
    with run_collector() as collector:
        with run_gateway(tmp_path, GATEWAY_SANDBOX_PORT="0", GATEWAY_TRACES_URL=collector.url) as gateway:
            answer = gateway.run_curl_example()
            assert answer.status_code == 201, answer.text
            gateway.wait_finished(answer.json()["links"]["self"])
            wait_until(lambda: bool(collector.spans), "what is sent before the end")
            assert gateway.stop() == 0
        request = collector.get_span("POST /v1/tasks/upscale")
        assert request.resource["service.name"] == "imaging-gateway"
        checks = collector.find_spans("check task")
        assert checks
        assert {link for check in checks for link in check.links} == {(request.trace_id, request.span_id)}
        assert gateway.token.encode() not in b"".join(collector.bodies)
        log = gateway.log_path.read_text()
        assert f"trace_id={request.trace_id}" in log
        assert "traces." not in log


def test_collector_unavailable(tmp_path: Path) -> None:
    """Without its collector a gateway serves as usual, logs little and exits soon."""
    with run_gateway(
        tmp_path, GATEWAY_SANDBOX_PORT="0", GATEWAY_TRACES_URL=f"http://127.0.0.1:{reserve_port()}"
    ) as gateway:
        answer = gateway.run_curl_example()
        assert answer.status_code == 201, answer.text
        gateway.wait_finished(answer.json()["links"]["self"])
        wait_until(lambda: "tracing.export_failed" in gateway.log_path.read_text(), "a line in the log")
        assert gateway.stop() == 0
    log = gateway.log_path.read_text()
    assert "Traceback" not in log
    assert log.count("traces.") < 5


def test_tracing_off(tmp_path: Path, env_without_extra: dict[str, str]) -> None:
    """Without a collector the extra is not imported, and need not be installed."""
    with run_gateway(tmp_path / "data", GATEWAY_SANDBOX_PORT="0", **env_without_extra) as gateway:
        answer = gateway.run_curl_example()
        assert answer.status_code == 201, answer.text
        gateway.wait_finished(answer.json()["links"]["self"])
        assert gateway.stop() == 0
    assert not (tmp_path / "mark").exists()


def test_not_installed(tmp_path: Path, env_without_extra: dict[str, str]) -> None:
    """With a collector but without the extra the gateway names the package and does not start."""
    env = gateway_environment(tmp_path / "data", GATEWAY_TRACES_URL="http://127.0.0.1:4318", **env_without_extra)
    done = subprocess.run(gateway_command("serve"), env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "GATEWAY_TRACES_URL" in done.stderr
    assert "pip install 'imaging-gateway[otel]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "value"),
    [("GATEWAY_TRACES_URL", "collector:4318"), ("GATEWAY_TRACES_SHARE", "2"), ("GATEWAY_TRACES_SHARE", "some")],
)
def test_invalid_settings(tmp_path: Path, setting: str, value: str) -> None:
    env = gateway_environment(tmp_path, **{setting: value})
    done = subprocess.run(gateway_command("serve"), env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert f"{setting} must be" in done.stderr
