"""A process takes over what a killed one left behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.chaos.process_cluster import call_admin
from tests.process.gateway import GatewayProcess, run_gateway, wait_until
from tests.process.sandbox import SandboxProcess, advance_clock, run_sandbox
from tests.support.images import make_png
from tests.support.valkey import Valkey

pytestmark = pytest.mark.xdist_group("processes")  # its processes are started once

LEASE_SECONDS = 180


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxProcess]:
    with run_sandbox() as sandbox:
        yield sandbox


def limit_tenant(gateway: GatewayProcess, tasks: int) -> None:
    """Limit the tasks of the demo tenant."""
    body = {"accounts": ["demo"], "limits": [{"window": "total", "tasks": tasks}], "max_active": 50}
    call_admin(gateway, "PUT", "/tenants/demo", json=body)


def read_usage(gateway: GatewayProcess) -> tuple[int, int, int]:
    """Return the used, held and active tasks of the demo tenant."""
    tasks, active = gateway.call("GET", "/v1/quota").json()["policies"]
    return tasks["used"], tasks["reserved"], active["used"]


def submit(gateway: GatewayProcess) -> httpx2.Response:
    return gateway.call("POST", "/v1/tasks/face-enhance", files={"image": ("a.png", make_png(), "image/png")})


def test_killed_process(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """A killed process's submission is settled as unknown, and its tasks are checked by the next."""
    shared, before = upstream.gateway_settings(valkey), upstream.count_requests("submit")
    with run_gateway(tmp_path / "victim", **shared) as victim, ThreadPoolExecutor() as threads:
        limit_tenant(victim, 7)
        checked = upstream.count_requests("check")
        upstream.set_faults({"on": "check", "reply": "hang"})
        watched = submit(victim).json()["links"]["self"]
        wait_until(lambda: upstream.count_requests("check") > checked, "a check")
        upstream.set_faults({"on": "submit", "reply": "hang"})
        lost = threads.submit(submit, victim)
        wait_until(lambda: upstream.count_requests("submit", "accepted") == before + 2, "the acceptance")
        assert read_usage(victim) == (1, 1, 2)
        victim.stop(signal.SIGKILL)
        assert isinstance(lost.exception(), httpx2.TransportError)
    upstream.set_faults()
    advance_clock(valkey, shared["GATEWAY_KEY_PREFIX"], LEASE_SECONDS)
    with run_gateway(tmp_path / "next", **shared) as survivor:
        assert survivor.wait_finished(watched)["state"] == "succeeded"
        wait_until(lambda: read_usage(survivor) == (2, 0, 0), "the settlement")
        account = call_admin(survivor, "GET", "/accounts/demo")
        assert (account["unknown"], account["in_flight"]) == (1, 0)
        assert upstream.count_requests("submit") == before + 2
