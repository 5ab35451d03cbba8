"""Shutdown of `gateway serve`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.behaviour.requests import UNREACHABLE_LIMITS
from tests.process.gateway import (
    HTTP,
    TIMEOUT_SECONDS,
    GatewayProcess,
    is_alive,
    run_gateway,
    start_gateway,
    wait_until,
)
from tests.process.sandbox import SandboxProcess, advance_clock, call_admin, run_sandbox
from tests.support.valkey import Valkey, run_valkey

SHORT_SHUTDOWN_PROGRAM = """
from importlib import import_module
from service.cli import main
import_module("service.cli.serve")._SHUTDOWN_MARGIN_SECONDS = 1 - 2 * 90
main(["serve"])
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxProcess]:
    with run_sandbox() as sandbox:
        yield sandbox


def is_closed(url: str) -> bool:
    """Return whether the port refuses connections; one accepted while it closes is cut off instead."""
    try:
        HTTP.get(f"{url}/healthz")
    except httpx2.TransportError as error:
        return isinstance(error, httpx2.ConnectError)
    return False


def read_usage(gateway: GatewayProcess) -> tuple[int, int, int]:
    """Return the used, held and active tasks of the demo tenant."""
    tasks, active = gateway.call("GET", "/v1/quota").json()["policies"]
    return tasks["used"], tasks["reserved"], active["used"]


def test_shutdown_ends_waits_and_finishes_requests(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    upstream.set_faults(seconds=3_600)
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway, ThreadPoolExecutor(7) as threads:
        links = gateway.run_curl_example().json()["links"]
        before = upstream.count_requests("submit")
        waiting = [threads.submit(gateway.call, "GET", links["self"], headers={"Prefer": "wait=60"}) for _ in range(3)]
        waiting += [threads.submit(gateway.call, "GET", links["events"]) for _ in range(3)]
        wait_until(lambda: "\ngateway_waiting_clients 6.0\n" in HTTP.get(f"{gateway.ops_url}/metrics").text, "clients")
        upstream.set_faults({"on": "submit", "times": 1, "latency": 1.2})
        submitting = threads.submit(gateway.run_curl_example)
        wait_until(lambda: upstream.count_requests("submit") > before, "the submit")
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: HTTP.get(f"{gateway.ops_url}/readyz").status_code == 503, "the draining")
        wait_until(lambda: is_closed(gateway.url), "the end of listening")
        assert submitting.result().status_code == 201
        assert [answer.result().status_code for answer in waiting] == [200] * 6
        assert gateway.process.wait(TIMEOUT_SECONDS) == 0
    log = gateway.log_path.read_text()
    assert ("Traceback" in log, "returned without" in log) == (False, False)


def test_second_signal_ends_at_once(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    shared = upstream.gateway_settings(valkey)
    with run_gateway(tmp_path / "first", **shared) as gateway, ThreadPoolExecutor() as threads:
        call_admin(gateway, "PUT", "/tenants/demo", json={"accounts": ["demo"], **UNREACHABLE_LIMITS})
        before = upstream.count_requests("submit")
        upstream.set_faults({"on": "submit", "times": 1, "reply": "hang"})
        submitting = threads.submit(gateway.run_curl_example)
        wait_until(lambda: upstream.count_requests("submit") > before, "the submit")
        assert read_usage(gateway) == (0, 1, 1)
        gateway.process.send_signal(signal.SIGTERM)
        gateway.wait_for_log("shutdown.begun")
        assert gateway.stop(signal.SIGINT) == 1
        assert isinstance(submitting.exception(), httpx2.TransportError)
    advance_clock(valkey, shared["GATEWAY_KEY_PREFIX"], 180)
    with run_gateway(tmp_path / "second", **shared) as gateway:
        wait_until(lambda: read_usage(gateway) == (1, 0, 0), "the end of the lease")
        assert upstream.count_requests("submit") == before + 1


@pytest.mark.parametrize("is_dead", [True, False])
def test_shutdown_without_the_store(tmp_path: Path, upstream: SandboxProcess, is_dead: bool) -> None:
    with run_valkey() as store, run_gateway(tmp_path, **upstream.gateway_settings(store)) as gateway:
        if is_dead:
            store.kill()
        else:
            store.suspend()
        assert gateway.stop() == 0
        assert "Traceback" not in gateway.log_path.read_text()


def test_pending_settlements_delay_the_shutdown_for_a_limited_time(tmp_path: Path, upstream: SandboxProcess) -> None:
    with run_valkey() as store, ThreadPoolExecutor() as threads:
        settings = upstream.gateway_settings(store) | {"GATEWAY_LEASE_SECONDS": "90"}
        with run_gateway(tmp_path, [sys.executable, "-c", SHORT_SHUTDOWN_PROGRAM], **settings) as gateway:
            before = upstream.count_requests("submit")
            upstream.set_faults({"on": "submit", "times": 1, "latency": 0.5})
            submitting = threads.submit(gateway.run_curl_example)
            wait_until(lambda: upstream.count_requests("submit") > before, "the submit")
            store.kill()
            assert submitting.result().status_code == 201
            assert gateway.stop() == 1
            assert "shutdown.overdue" in gateway.log_path.read_text()


def test_signal_during_start_ends_silently(tmp_path: Path) -> None:
    with start_gateway(tmp_path) as gateway:
        listed = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children")
        wait_until(lambda: bool(listed.read_text()), "a child")
        children = [int(pid) for pid in listed.read_text().split()]
        assert gateway.stop() == 0
        assert not any(is_alive(child) for child in children)
    assert (gateway.stdout_path.read_text(), gateway.log_path.read_text()) == ("", "")
