"""How a gateway ends, and what it says where it can't begin."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.process.gateway import Gateway, alive, environment, serving, started, until
from tests.process.sandbox import Sandbox, advance, sandbox
from tests.support.valkey import Valkey, free_port, running

IMPATIENT = """
from service.cli import main
from service.storage import embedded
embedded._LOCK_SECONDS = 0.1
main(["serve"])
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Sandbox]:
    """An upstream for all tests of this module."""
    with sandbox() as found:
        yield found


def refuses(url: str) -> bool:
    """Whether nobody listens there any more; who comes in the very moment of the close is cut off instead."""
    try:
        httpx2.get(f"{url}/healthz")
    except httpx2.TransportError as error:
        return isinstance(error, httpx2.ConnectError)
    return False


def used(gateway: Gateway) -> tuple[int, int, int]:
    """What the demo tenant has used, holds and has active, where its policies are those of `limited`."""
    tasks, active = gateway.call("GET", "/v1/quota").json()["policies"]
    return tasks["used"], tasks["reserved"], active["used"]


def test_what_was_begun_is_finished(tmp_path: Path, valkey: Valkey, upstream: Sandbox) -> None:
    """A gateway that is told to end takes nothing new, says so to operators, and answers what it was sent before."""
    with serving(tmp_path, **upstream.shared(valkey)) as gateway, ThreadPoolExecutor() as threads:
        before = upstream.count("submit")
        upstream.dial({"on": "submit", "times": 1, "latency": 1.2})
        submitting = threads.submit(gateway.tried)
        until(lambda: upstream.count("submit") > before, "the submit")
        gateway.process.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{gateway.ops_url}/readyz").status_code == 503, "the draining")
        until(lambda: refuses(gateway.url), "the end of listening")
        assert submitting.result().status_code == 201
        assert gateway.process.wait(30) == 0
    assert "Traceback" not in gateway.log.read_text()


def test_second_signal(tmp_path: Path, valkey: Valkey, upstream: Sandbox) -> None:
    """The second signal ends a gateway at once, and the lease settles as unknown what was under way."""
    shared = upstream.shared(valkey)
    with serving(tmp_path / "first", **shared) as gateway, ThreadPoolExecutor() as threads:
        limits = {"accounts": ["demo"], "limits": [{"window": "total", "tasks": 5}], "max_active": 5}
        headers = {"Authorization": f"Bearer {shared['GATEWAY_ADMIN_TOKEN']}"}
        httpx2.put(f"{gateway.ops_url}/admin/v1/tenants/demo", json=limits, headers=headers).raise_for_status()
        before = upstream.count("submit")
        upstream.dial({"on": "submit", "times": 1, "reply": "hang"})
        submitting = threads.submit(gateway.tried)
        until(lambda: upstream.count("submit") > before, "the submit")
        assert used(gateway) == (0, 1, 1)
        gateway.process.send_signal(signal.SIGTERM)
        until(lambda: "shutdown.begun" in gateway.log.read_text(), "the first signal")
        assert gateway.end(signal.SIGINT) == 1
        assert isinstance(submitting.exception(), httpx2.TransportError)
    advance(valkey, shared["GATEWAY_KEY_PREFIX"], 180)
    with serving(tmp_path / "second", **shared) as gateway:
        until(lambda: used(gateway) == (1, 0, 0), "the end of the lease")
        assert upstream.count("submit") == before + 1


def test_told_to_end_while_it_starts(tmp_path: Path) -> None:
    """A gateway that is told to end before it serves ends without a word, with what it has started by then."""
    with started(tmp_path) as gateway:
        listed = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children")
        until(lambda: bool(listed.read_text()), "a child")
        children = [int(pid) for pid in listed.read_text().split()]
        assert gateway.end() == 0
        assert not any(alive(child) for child in children)
    assert (gateway.out.read_text(), gateway.log.read_text()) == ("", "")


def test_folder_in_use(tmp_path: Path) -> None:
    """A data folder that another gateway has is named in one line."""
    with (tmp_path / "valkey.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = environment(tmp_path, GATEWAY_PORT="0", GATEWAY_OPS_PORT="0")
        done = subprocess.run([sys.executable, "-c", IMPATIENT], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"gateway: another gateway uses the data folder {tmp_path}\n"


def test_first_start_without_the_store(tmp_path: Path, valkey: Valkey, upstream: Sandbox) -> None:
    """A first start waits for a store that is away, and introduces itself once it is there."""
    port = free_port()
    shared = upstream.shared(valkey) | {"GATEWAY_REDIS_URL": f"redis://127.0.0.1:{port}"}
    with started(tmp_path, **shared) as gateway:
        until(lambda: "demo.delayed" in gateway.log.read_text(), "a word about the store")
        assert httpx2.get(f"{gateway.ops_url}/healthz").status_code == 200
        assert httpx2.get(f"{gateway.ops_url}/readyz").status_code == 503
        with running(port=port):
            gateway.ready()
            assert gateway.tried().status_code == 201
            assert gateway.end() == 0


def test_damaged_sandbox(tmp_path: Path) -> None:
    """Why the sandbox can't start is told in one line, and nothing is left running."""
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "sandbox" / "sandbox.sqlite3").write_bytes(b"no database at all" * 100)
    with started(tmp_path) as gateway:
        assert gateway.process.wait(30) == 1
    (line,) = gateway.log.read_text().splitlines()
    assert line.startswith("gateway: the sandbox did not start (GATEWAY_SANDBOX_PORT, ")
    assert line.endswith("file is not a database")
