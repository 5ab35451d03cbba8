"""Waiting clients at shutdown and after they disconnect."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.process.gateway import GatewayProcess, run_gateway, wait_until
from tests.process.sandbox import SandboxProcess, run_sandbox
from tests.support.valkey import Valkey

CLIENTS = 50
PROMPT_SECONDS = 10.0
"""Enough seconds for a hundred responses on a busy machine, and far less than any client would wait."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxProcess]:
    """Yield an upstream whose tasks take an hour."""
    with run_sandbox() as sandbox:
        sandbox.set_faults(seconds=3_600)
        yield sandbox


def send_request(gateway: GatewayProcess, stack: ExitStack, path: str, *headers: str) -> socket.socket:
    """Open a connection and send a request."""
    client = stack.enter_context(socket.create_connection(("127.0.0.1", int(gateway.environ["GATEWAY_PORT"])), 30))
    lines = [f"GET {path} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {gateway.token}", *headers, "", ""]
    client.sendall("\r\n".join(lines).encode())
    return client


def read_response(client: socket.socket) -> bytes:
    """Read a connection to its end."""
    received = b""
    while chunk := client.recv(65_536):
        received += chunk
    return received


def count_waiting(gateway: GatewayProcess) -> int:
    """Return the number of waiting clients from the metrics."""
    for line in httpx2.get(f"{gateway.ops_url}/metrics").text.splitlines():
        if line.startswith("gateway_waiting_clients "):
            return int(float(line.split()[1]))
    raise AssertionError


def count_connections(gateway: GatewayProcess) -> int:
    """Return the number of connections of clients that the gateway has open; its pools to Redis may grow meanwhile."""
    port = urlsplit(gateway.url).port
    rows = [line.split() for line in Path(f"/proc/{gateway.process.pid}/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[1].rpartition(":")[2], 16) == port and row[3] in {"01", "08"} for row in rows)


def test_shutdown(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """All waits and streams end cleanly at once, and the process exits."""
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway, ExitStack() as stack:
        links = gateway.run_curl_example().json()["links"]
        waits = [send_request(gateway, stack, links["self"], "Prefer: wait=60") for _ in range(CLIENTS)]
        streams = [send_request(gateway, stack, links["events"]) for _ in range(CLIENTS)]
        wait_until(lambda: count_waiting(gateway) == 2 * CLIENTS, "the waiting")
        result = time.monotonic()
        assert gateway.stop(signal.SIGTERM) == 0
        assert time.monotonic() - result < PROMPT_SECONDS
        for answer in map(read_response, waits):
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"preference-applied: wait=60" in answer
            assert b'"state":"queued"' in answer or b'"state":"running"' in answer
        for answer in map(read_response, streams):
            assert b"event: state" in answer
            assert answer.endswith(b"\r\n0\r\n\r\n")
    assert "Traceback" not in gateway.log_path.read_text()
    assert "returned without" not in gateway.log_path.read_text()


def test_disconnected_clients(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """Disconnected clients leave no waits and no connections."""
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway:
        links = gateway.run_curl_example().json()["links"]
        with ExitStack() as stack:
            for _ in range(CLIENTS):
                send_request(gateway, stack, links["self"], "Prefer: wait=60")
                send_request(gateway, stack, links["events"])
            wait_until(lambda: count_waiting(gateway) == 2 * CLIENTS, "the waiting")
            assert count_connections(gateway) == 2 * CLIENTS
        wait_until(lambda: count_waiting(gateway) == 0, "the leaving")
        wait_until(lambda: count_connections(gateway) == 0, "the end of the connections")
        assert gateway.call("GET", links["self"]).status_code == 200
    assert "Traceback" not in gateway.log_path.read_text()
