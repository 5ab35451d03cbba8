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

from tests.process.gateway import Gateway, serving, until
from tests.process.sandbox import Sandbox, sandbox
from tests.support.valkey import Valkey

EACH = 50
PROMPTLY = 10.0
"""Seconds that are enough for a hundred answers on a busy machine, and far less than any of them would wait."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Sandbox]:
    """An upstream for all tests of this module, whose tasks take an hour."""
    with sandbox() as found:
        found.dial(seconds=3_600)
        yield found


def asked(gateway: Gateway, stack: ExitStack, path: str, *headers: str) -> socket.socket:
    """A connection on which a request was sent."""
    client = stack.enter_context(socket.create_connection(("127.0.0.1", int(gateway.environ["GATEWAY_PORT"])), 30))
    lines = [f"GET {path} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {gateway.token}", *headers, "", ""]
    client.sendall("\r\n".join(lines).encode())
    return client


def answered(client: socket.socket) -> bytes:
    """All that comes on a connection until it is closed."""
    received = b""
    while chunk := client.recv(65_536):
        received += chunk
    return received


def waiting(gateway: Gateway) -> int:
    """How many wait or follow, as the gateway tells its operators."""
    for line in httpx2.get(f"{gateway.ops_url}/metrics").text.splitlines():
        if line.startswith("gateway_waiting_clients "):
            return int(float(line.split()[1]))
    raise AssertionError


def sockets(gateway: Gateway) -> int:
    """How many sockets the gateway has open."""
    found = 0
    for each in Path(f"/proc/{gateway.process.pid}/fd").iterdir():
        try:
            found += str(each.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue
    return found


def test_told_to_end(tmp_path: Path, valkey: Valkey, upstream: Sandbox) -> None:
    """All waits and streams are answered and ended in good order at once, and the process is gone."""
    with serving(tmp_path, **upstream.shared(valkey)) as gateway, ExitStack() as stack:
        links = gateway.tried().json()["links"]
        waits = [asked(gateway, stack, links["self"], "Prefer: wait=60") for _ in range(EACH)]
        streams = [asked(gateway, stack, links["events"]) for _ in range(EACH)]
        until(lambda: waiting(gateway) == 2 * EACH, "the waiting")
        told = time.monotonic()
        assert gateway.end(signal.SIGTERM) == 0
        assert time.monotonic() - told < PROMPTLY
        for answer in map(answered, waits):
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"preference-applied: wait=60" in answer
            assert b'"state":"queued"' in answer or b'"state":"running"' in answer
        for answer in map(answered, streams):
            assert b"event: state" in answer
            assert answer.endswith(b"\r\n0\r\n\r\n")
    assert "Traceback" not in gateway.log.read_text()
    assert "returned without" not in gateway.log.read_text()


def test_clients_that_leave(tmp_path: Path, valkey: Valkey, upstream: Sandbox) -> None:
    """Clients that are gone are forgotten, with all their connections."""
    with serving(tmp_path, **upstream.shared(valkey)) as gateway:
        links = gateway.tried().json()["links"]
        waiting(gateway)
        before = sockets(gateway)
        with ExitStack() as stack:
            for _ in range(EACH):
                asked(gateway, stack, links["self"], "Prefer: wait=60")
                asked(gateway, stack, links["events"])
            until(lambda: waiting(gateway) == 2 * EACH, "the waiting")
        until(lambda: waiting(gateway) == 0, "the leaving")
        until(lambda: sockets(gateway) <= before + 1, "the end of the connections")
        assert gateway.call("GET", links["self"]).status_code == 200
    assert "Traceback" not in gateway.log.read_text()
