"""Many slow readers of large results: memory of the process, and other tenants."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx2

from tests.contract.scripted_server import vendor_response
from tests.process.gateway import HTTP, TIMEOUT_SECONDS, GatewayProcess, run_gateway
from tests.process.sandbox import SandboxProcess
from tests.support.images import make_png
from tests.support.valkey import Valkey

RESULT_BYTES = 100_000_000
TENANTS = ("shop-1", "shop-2", "shop-3", "shop-4", "other")
READERS_PER_TENANT = 25
PROGRAM = """
from service.cli import main
from service.usecases import task_status
task_status.MAX_DOWNLOADS = 108
main(["serve"])
"""
"""A gateway whose shares let each of four tenants have 25 downloads and leave room for a fifth."""


class _Vendor(BaseHTTPRequestHandler):
    """A vendor whose tasks are complete at once, with one large image as their result."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        fields = {"status": "Completed", "images_url": "/1.png"} if "check" in self.path else {"task_id": "t-1"}
        self.wfile.write(vendor_response(err_code=0, remaining_count=9, remaining_money=9, **fields))

    def do_GET(self) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {RESULT_BYTES}\r\n\r\n".encode()
        piece = make_png().ljust(1_000_000, b"\0")
        with suppress(OSError):
            self.wfile.write(head)
            for _ in range(RESULT_BYTES // len(piece)):
                self.wfile.write(piece)


@contextmanager
def run_vendor() -> Iterator[SandboxProcess]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Vendor) as server:
        serving = Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        try:
            yield SandboxProcess(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            serving.join()


def create_download(gateway: GatewayProcess, tenant: str) -> tuple[str, str]:
    """Create a tenant with a finished task; return its token and the path of the result."""
    admin = {"Authorization": f"Bearer {gateway.environ['GATEWAY_ADMIN_TOKEN']}"}
    url = f"{gateway.ops_url}/admin/v1/tenants/{tenant}"
    HTTP.put(url, json={"accounts": ["demo"]}, headers=admin).raise_for_status()
    token = HTTP.post(f"{url}/tokens", json={}, headers=admin).raise_for_status().json()["token"]
    gateway.token = str(token)
    response = gateway.call("POST", "/v1/tasks/face-enhance", files={"image": make_png()}, headers={"Prefer": "wait"})
    return gateway.token, response.json()["artifacts"][0]["href"]


def read_memory(gateway: GatewayProcess, field: str) -> int:
    """Return a figure of the process in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{gateway.process.pid}/status").read_text())
    assert match
    return int(match[1]) * 1024


def open_reader(gateway: GatewayProcess, token: str, path: str) -> socket.socket:
    """Request a result and read the status line."""
    address = httpx2.URL(gateway.url)
    reader = socket.create_connection((address.host, address.port or 0), TIMEOUT_SECONDS)
    reader.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
    assert reader.recv(15) == b"HTTP/1.1 200 OK"
    return reader


def test_slow_readers_cost_little_memory_and_no_other_tenant(tmp_path: Path, valkey: Valkey) -> None:
    with (
        run_vendor() as vendor,
        run_gateway(tmp_path, [sys.executable, "-c", PROGRAM], **vendor.gateway_settings(valkey)) as gateway,
        ExitStack() as readers,
    ):
        *slow, other = [create_download(gateway, tenant) for tenant in TENANTS]
        before = read_memory(gateway, "VmRSS")
        for download in slow * READERS_PER_TENANT:
            readers.enter_context(open_reader(gateway, *download))
        started_at = time.monotonic()
        with open_reader(gateway, *other) as reader:
            assert time.monotonic() - started_at < 1
            received = 0
            while received < RESULT_BYTES:
                received += len(reader.recv(1_000_000))
        assert read_memory(gateway, "VmHWM") - before < 60_000_000
