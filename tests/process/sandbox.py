"""`gateway sandbox` as a process, shared by several gateways."""

from __future__ import annotations

import base64
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis

from service.devstack import SANDBOX_USER_KEY
from service.storage.redis import Keys
from tests.process.gateway import HTTP, TIMEOUT_SECONDS, GatewayProcess, gateway_command
from tests.support.valkey import Valkey

ADMIN_TOKEN = "7d0c5be19a4f4c2f8e6b3a9d15c07f42"


@dataclass(frozen=True)
class SandboxProcess:
    """A running sandbox."""

    url: str

    def set_faults(self, *faults: dict[str, Any], seconds: float = 0) -> None:
        """Replace all faults, and set the duration of tasks from now on."""
        body = {"seconds": seconds, "faults": faults}
        HTTP.put(f"{self.url}/_control/behaviour", json=body).raise_for_status()

    def count_requests(self, operation: str, outcome: str | None = None) -> int:
        """Count the submits or checks received, optionally those with an outcome."""
        records = HTTP.get(f"{self.url}/_control/requests").json()
        return sum(item["operation"] == operation and outcome in {None, item["outcome"]} for item in records)

    def gateway_settings(self, store: Valkey) -> dict[str, str]:
        """Return settings for gateways on this upstream with a new key prefix in a store."""
        return {
            "GATEWAY_REDIS_URL": store.url,
            "GATEWAY_KEY_PREFIX": f"t-{secrets.token_hex(4)}",
            "GATEWAY_UPSTREAM_URL": self.url,
            "GATEWAY_UPSTREAM_USER_KEY": SANDBOX_USER_KEY,
            "GATEWAY_SECRET_KEYS": base64.b64encode(b"s" * 32).decode(),
            "GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN,
            "GATEWAY_POLL_SECONDS": "0.05",
        }


@contextmanager
def run_sandbox() -> Iterator[SandboxProcess]:
    """Run a sandbox whose tasks take no time; it must exit with 0."""
    process = subprocess.Popen(
        gateway_command("sandbox", "--port", "0"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    if process.stdout is None:
        raise AssertionError
    with process.stdout as output:
        try:
            result = SandboxProcess(output.readline().decode().strip())
            result.set_faults()
            yield result
        finally:
            process.terminate()
            ended = process.wait(TIMEOUT_SECONDS)
    assert ended == 0


def read_clock(store: Valkey, prefix: str) -> float:
    """Return the time in seconds of the server of a prefix, which is the real one until it is set."""
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        milliseconds: Any = client.get(f"{Keys(prefix).clock}:server")
        return int(milliseconds) / 1000 if milliseconds else time.time()


def advance_clock(store: Valkey, prefix: str, seconds: float) -> None:
    """Advance the clock of a prefix, which stands still from then on."""
    now = read_clock(store, prefix)
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        client.set(f"{Keys(prefix).clock}:server", round((now + seconds) * 1000))


def call_admin(gateway: GatewayProcess, method: str, path: str, **more: Any) -> Any:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    answer = HTTP.request(method, f"{gateway.ops_url}/admin/v1{path}", headers=headers, **more)
    assert answer.is_success, answer.text
    return answer.json()
