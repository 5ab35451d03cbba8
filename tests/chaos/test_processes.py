"""What one process promised, the next keeps, also when it was killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.chaos.fleet import admin
from tests.process.gateway import Gateway, serving, until
from tests.process.sandbox import Sandbox, advance, sandbox
from tests.support.images import png
from tests.support.valkey import Valkey

pytestmark = pytest.mark.xdist_group("processes")  # its processes are started once

LEASE_SECONDS = 180


@pytest.fixture(scope="module")
def upstream() -> Iterator[Sandbox]:
    """An upstream for all tests of this module."""
    with sandbox() as found:
        yield found


def limited(gateway: Gateway, tasks: int) -> None:
    """Let the demo tenant submit so many tasks."""
    body = {"accounts": ["demo"], "limits": [{"window": "total", "tasks": tasks}], "max_active": 50}
    admin(gateway, "PUT", "/tenants/demo", json=body)


def used(gateway: Gateway) -> tuple[int, int, int]:
    """What the demo tenant has used, holds and has active."""
    tasks, active = gateway.call("GET", "/v1/quota").json()["policies"]
    return tasks["used"], tasks["reserved"], active["used"]


def submit(gateway: Gateway) -> httpx2.Response:
    """Submit a small picture."""
    return gateway.call("POST", "/v1/tasks/face-enhance", files={"image": ("a.png", png(), "image/png")})


def test_killed_process(tmp_path: Path, valkey: Valkey, upstream: Sandbox) -> None:
    """What a killed process was sending is settled as unknown, and what it watched is watched by the next."""
    shared, before = upstream.shared(valkey), upstream.count("submit")
    with serving(tmp_path / "victim", **shared) as victim, ThreadPoolExecutor() as threads:
        limited(victim, 7)
        checked = upstream.count("check")
        upstream.dial({"on": "check", "reply": "hang"})
        watched = submit(victim).json()["links"]["self"]
        until(lambda: upstream.count("check") > checked, "a check")
        upstream.dial({"on": "submit", "reply": "hang"})
        lost = threads.submit(submit, victim)
        until(lambda: upstream.count("submit", "accepted") == before + 2, "the acceptance")
        assert used(victim) == (1, 1, 2)
        victim.end(signal.SIGKILL)
        assert isinstance(lost.exception(), httpx2.TransportError)
    upstream.dial()
    advance(valkey, shared["GATEWAY_KEY_PREFIX"], LEASE_SECONDS)
    with serving(tmp_path / "next", **shared) as survivor:
        assert survivor.finished(watched)["state"] == "succeeded"
        until(lambda: used(survivor) == (2, 0, 0), "the settlement")
        account = admin(survivor, "GET", "/accounts/demo")
        assert (account["unknown"], account["in_flight"]) == (1, 0)
        assert upstream.count("submit") == before + 2
