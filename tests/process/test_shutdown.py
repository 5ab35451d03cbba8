"""Shutdown of `gateway serve`, its waiting clients, and a lack of file descriptors."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from service.clients.http import BREAKER_THRESHOLD
from tests.process.gateway import (
    HTTP,
    TIMEOUT_SECONDS,
    GatewayProcess,
    is_alive,
    run_gateway,
    start_gateway,
    wait_until,
)
from tests.process.sandbox import SandboxProcess, advance_clock, run_sandbox
from tests.support.images import make_png
from tests.support.network import exhaust_descriptors
from tests.support.valkey import Valkey, run_valkey

SHORT_SHUTDOWN_PROGRAM = """
from importlib import import_module
from service.cli import main
import_module("service.cli.serve")._SHUTDOWN_MARGIN_SECONDS = 1 - 2 * 90
main(["serve"])
"""
CLIENTS = 50


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


def limit_tenant(gateway: GatewayProcess, **limits: int) -> None:
    """Limit the tasks of the demo tenant in total and, with `max_active`, at once."""
    policy = {"accounts": ["demo"], "limits": [{"window": "total", "tasks": 100}], **limits}
    headers = {"Authorization": f"Bearer {gateway.environ['GATEWAY_ADMIN_TOKEN']}"}
    HTTP.put(f"{gateway.ops_url}/admin/v1/tenants/demo", json=policy, headers=headers).raise_for_status()


def read_usage(gateway: GatewayProcess) -> tuple[int, ...]:
    """Return the used and held tasks of the demo tenant, and the active ones if they are limited."""
    tasks, *active = gateway.call("GET", "/v1/quota").json()["policies"]
    return tasks["used"], tasks["reserved"], *(item["used"] for item in active)


def test_requests_are_finished(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """On SIGTERM a gateway accepts nothing new, turns unready, and finishes its requests."""
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway, ThreadPoolExecutor() as threads:
        before = upstream.count_requests("submit")
        upstream.set_faults({"on": "submit", "times": 1, "latency": 1.2})
        submitting = threads.submit(gateway.run_curl_example)
        wait_until(lambda: upstream.count_requests("submit") > before, "the submit")
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: HTTP.get(f"{gateway.ops_url}/readyz").status_code == 503, "the draining")
        wait_until(lambda: is_closed(gateway.url), "the end of listening")
        assert submitting.result().status_code == 201
        assert gateway.process.wait(TIMEOUT_SECONDS) == 0
    assert "Traceback" not in gateway.log_path.read_text()


def test_second_signal(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """A second signal ends it at once; the lease settles its submissions as unknown."""
    shared = upstream.gateway_settings(valkey)
    with run_gateway(tmp_path / "first", **shared) as gateway, ThreadPoolExecutor() as threads:
        limit_tenant(gateway, max_active=5)
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
    """A gateway ends cleanly although its store is dead or hangs, if nothing is left to settle."""
    with run_valkey() as store, run_gateway(tmp_path, **upstream.gateway_settings(store)) as gateway:
        if is_dead:
            store.kill()
        else:
            store.suspend()
        assert gateway.stop() == 0
        assert "Traceback" not in gateway.log_path.read_text()


def test_shutdown_timeout(tmp_path: Path, upstream: SandboxProcess) -> None:
    """Pending settlements delay the shutdown only for a limited time."""
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


def test_signal_during_start(tmp_path: Path) -> None:
    """A signal during the start ends it silently, with everything started so far."""
    with start_gateway(tmp_path) as gateway:
        listed = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children")
        wait_until(lambda: bool(listed.read_text()), "a child")
        children = [int(pid) for pid in listed.read_text().split()]
        assert gateway.stop() == 0
        assert not any(is_alive(child) for child in children)
    assert (gateway.stdout_path.read_text(), gateway.log_path.read_text()) == ("", "")


def send_request(gateway: GatewayProcess, stack: ExitStack, path: str, *headers: str) -> socket.socket:
    """Open a connection and send a request."""
    client = stack.enter_context(socket.create_connection(("127.0.0.1", int(gateway.environ["GATEWAY_PORT"])), 30))
    lines = [f"GET {path} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {gateway.token}", *headers, "", ""]
    client.sendall("\r\n".join(lines).encode())
    return client


def read_response(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65_536), b""))


def wait_for_clients(gateway: GatewayProcess, number: int) -> None:
    """Wait until so many clients wait, and so many connections of clients are open."""
    port = int(gateway.environ["GATEWAY_PORT"])

    def is_reached() -> bool:
        waiting = f"\ngateway_waiting_clients {number}.0\n" in HTTP.get(f"{gateway.ops_url}/metrics").text
        rows = [line.split() for line in Path(f"/proc/{gateway.process.pid}/net/tcp").read_text().splitlines()[1:]]
        opened = sum(int(row[1].rpartition(":")[2], 16) == port and row[3] in {"01", "08"} for row in rows)
        return waiting and opened == number

    wait_until(is_reached, f"{number} waiting clients")


def test_waiting_clients(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """Clients that disconnect leave nothing behind; at shutdown all waits and streams end cleanly at once."""
    upstream.set_faults(seconds=3_600)
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway, ExitStack() as stack:
        links = gateway.run_curl_example().json()["links"]
        with ExitStack() as leaving:
            for _ in range(CLIENTS):
                send_request(gateway, leaving, links["self"], "Prefer: wait=60")
                send_request(gateway, leaving, links["events"])
            wait_for_clients(gateway, 2 * CLIENTS)
        wait_for_clients(gateway, 0)
        waits = [send_request(gateway, stack, links["self"], "Prefer: wait=60") for _ in range(CLIENTS)]
        streams = [send_request(gateway, stack, links["events"]) for _ in range(CLIENTS)]
        wait_for_clients(gateway, 2 * CLIENTS)
        assert gateway.stop(signal.SIGTERM) == 0
        for answer in map(read_response, waits):
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"preference-applied: wait=60" in answer
            assert b'"state":"queued"' in answer or b'"state":"running"' in answer
        for answer in map(read_response, streams):
            assert b"event: state" in answer
            assert answer.endswith(b"\r\n0\r\n\r\n")
    log = gateway.log_path.read_text()
    assert ("Traceback" in log, "returned without" in log) == (False, False)


def test_lack_of_descriptors(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """A submission that fails for lack of a descriptor costs nothing, frees its key, and succeeds once there is one."""
    upstream.set_faults()
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway:
        limit_tenant(gateway)
        headers = {"Authorization": f"Bearer {gateway.token}"}
        before = upstream.count_requests("submit")
        with (
            ThreadPoolExecutor() as threads,
            httpx2.Client(base_url=gateway.url, timeout=TIMEOUT_SECONDS, headers=headers) as client,
        ):

            def submit() -> httpx2.Response:
                key = {"Idempotency-Key": '"the-same"'}
                return client.post("/v1/tasks/face-enhance", files={"image": ("image.png", make_png())}, headers=key)

            assert gateway.run_curl_example().status_code == 201  # so that the scripts are loaded
            list(threads.map(lambda _: read_usage(gateway), range(8)))  # connections to the store
            client.get("/v1/quota").raise_for_status()
            with exhaust_descriptors(gateway.process.pid):
                refused = [submit() for _ in range(BREAKER_THRESHOLD + 1)]
            assert {(item.status_code, item.json()["code"]) for item in refused} == {(503, "upstream-unavailable")}
            assert all("retry-after" in item.headers for item in refused)
            assert read_usage(gateway) == (1, 0)
            accepted = submit()
            assert (accepted.status_code, "idempotent-replayed" in accepted.headers) == (201, False)
            assert upstream.count_requests("submit") == before + 2
