"""A gateway that is told to end lets nobody wait any longer, and keeps nobody else waiting."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from tests.process.gateway import GatewayProcess, run_gateway, wait_until
from tests.process.sandbox import SandboxProcess, run_sandbox
from tests.support.valkey import Valkey

CLIENTS = 50
PROMPT_SECONDS = 10.0
"""Seconds that are enough for a hundred answers on a busy machine, and far less than any of them would wait."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxProcess]:
    """An upstream for all tests of this module, whose tasks take an hour."""
    with run_sandbox() as found:
        found.set_faults(seconds=3_600)
        yield found


def send_request(gateway: GatewayProcess, stack: ExitStack, path: str, *headers: str) -> socket.socket:
    """A connection on which a request was sent."""
    client = stack.enter_context(socket.create_connection(("127.0.0.1", int(gateway.environ["GATEWAY_PORT"])), 30))
    lines = [f"GET {path} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {gateway.token}", *headers, "", ""]
    client.sendall("\r\n".join(lines).encode())
    return client


def read_response(client: socket.socket) -> bytes:
    """All that comes on a connection until it is closed."""
    received = b""
    while chunk := client.recv(65_536):
        received += chunk
    return received


def count_waiting(gateway: GatewayProcess) -> int:
    """How many wait or follow, as the gateway tells its operators."""
    for line in httpx2.get(f"{gateway.ops_url}/metrics").text.splitlines():
        if line.startswith("gateway_waiting_clients "):
            return int(float(line.split()[1]))
    raise AssertionError


def count_sockets(gateway: GatewayProcess) -> int:
    """How many sockets the gateway has open."""
    found = 0
    for each in Path(f"/proc/{gateway.process.pid}/fd").iterdir():
        try:
            found += str(each.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue
    return found


def test_told_to_end(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """All waits and streams are answered and ended in good order at once, and the process is gone."""
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway, ExitStack() as stack:
        links = gateway.run_curl_example().json()["links"]
        waits = [send_request(gateway, stack, links["self"], "Prefer: wait=60") for _ in range(CLIENTS)]
        streams = [send_request(gateway, stack, links["events"]) for _ in range(CLIENTS)]
        wait_until(lambda: count_waiting(gateway) == 2 * CLIENTS, "the waiting")
        told = time.monotonic()
        assert gateway.stop(signal.SIGTERM) == 0
        assert time.monotonic() - told < PROMPT_SECONDS
        for answer in map(read_response, waits):
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"preference-applied: wait=60" in answer
            assert b'"state":"queued"' in answer or b'"state":"running"' in answer
        for answer in map(read_response, streams):
            assert b"event: state" in answer
            assert answer.endswith(b"\r\n0\r\n\r\n")
    assert "Traceback" not in gateway.log_path.read_text()
    assert "returned without" not in gateway.log_path.read_text()


def test_clients_that_leave(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """Clients that are gone are forgotten, with all their connections."""
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway:
        links = gateway.run_curl_example().json()["links"]
        count_waiting(gateway)
        before = count_sockets(gateway)
        with ExitStack() as stack:
            for _ in range(CLIENTS):
                send_request(gateway, stack, links["self"], "Prefer: wait=60")
                send_request(gateway, stack, links["events"])
            wait_until(lambda: count_waiting(gateway) == 2 * CLIENTS, "the waiting")
        wait_until(lambda: count_waiting(gateway) == 0, "the leaving")
        wait_until(lambda: count_sockets(gateway) <= before + 1, "the end of the connections")
        assert gateway.call("GET", links["self"]).status_code == 200
    assert "Traceback" not in gateway.log_path.read_text()
