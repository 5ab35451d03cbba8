"""Shutdown of a gateway, and errors that prevent its start."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from redis import Redis

from service.storage.redis import DATA_VERSION, Keys
from tests.process.gateway import GatewayProcess, gateway_environment, is_alive, run_gateway, start_gateway, wait_until
from tests.process.sandbox import SandboxProcess, advance_clock, run_sandbox
from tests.support.network import reserve_port
from tests.support.valkey import Valkey, run_valkey

SHORT_LOCK_PROGRAM = """
from service.cli import main
from service import devstack
devstack._LOCK_SECONDS = 0.1
main(["serve"])
"""

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
        httpx2.get(f"{url}/healthz")
    except httpx2.TransportError as error:
        return isinstance(error, httpx2.ConnectError)
    return False


def read_usage(gateway: GatewayProcess) -> tuple[int, int, int]:
    """Return the used, held and active tasks of the demo tenant with the policies of `limited`."""
    tasks, active = gateway.call("GET", "/v1/quota").json()["policies"]
    return tasks["used"], tasks["reserved"], active["used"]


def test_requests_are_finished(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """On SIGTERM a gateway accepts nothing new, turns unready, and finishes its requests."""
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway, ThreadPoolExecutor() as threads:
        before = upstream.count_requests("submit")
        upstream.set_faults({"on": "submit", "times": 1, "latency": 1.2})
        submitting = threads.submit(gateway.run_curl_example)
        wait_until(lambda: upstream.count_requests("submit") > before, "the submit")
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx2.get(f"{gateway.ops_url}/readyz").status_code == 503, "the draining")
        wait_until(lambda: is_closed(gateway.url), "the end of listening")
        assert submitting.result().status_code == 201
        assert gateway.process.wait(30) == 0
    assert "Traceback" not in gateway.log_path.read_text()


def test_second_signal(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """A second signal ends it at once; the lease settles its submissions as unknown."""
    shared = upstream.gateway_settings(valkey)
    with run_gateway(tmp_path / "first", **shared) as gateway, ThreadPoolExecutor() as threads:
        limits = {"accounts": ["demo"], "limits": [{"window": "total", "tasks": 5}], "max_active": 5}
        headers = {"Authorization": f"Bearer {shared['GATEWAY_ADMIN_TOKEN']}"}
        httpx2.put(f"{gateway.ops_url}/admin/v1/tenants/demo", json=limits, headers=headers).raise_for_status()
        before = upstream.count_requests("submit")
        upstream.set_faults({"on": "submit", "times": 1, "reply": "hang"})
        submitting = threads.submit(gateway.run_curl_example)
        wait_until(lambda: upstream.count_requests("submit") > before, "the submit")
        assert read_usage(gateway) == (0, 1, 1)
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "shutdown.begun" in gateway.log_path.read_text(), "the first signal")
        assert gateway.stop(signal.SIGINT) == 1
        assert isinstance(submitting.exception(), httpx2.TransportError)
    advance_clock(valkey, shared["GATEWAY_KEY_PREFIX"], 180)
    with run_gateway(tmp_path / "second", **shared) as gateway:
        wait_until(lambda: read_usage(gateway) == (1, 0, 0), "the end of the lease")
        assert upstream.count_requests("submit") == before + 1


@pytest.mark.parametrize("away", ["dead", "hanging"])
def test_shutdown_without_the_store(tmp_path: Path, upstream: SandboxProcess, away: str) -> None:
    """A gateway ends cleanly although its store is unavailable, if nothing is left to settle."""
    with run_valkey() as store, run_gateway(tmp_path, **upstream.gateway_settings(store)) as gateway:
        if away == "dead":
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


def test_folder_in_use(tmp_path: Path) -> None:
    """The error names the data folder in one line."""
    with (tmp_path / "valkey.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = gateway_environment(tmp_path, GATEWAY_PORT="0", GATEWAY_OPS_PORT="0")
        done = subprocess.run(
            [sys.executable, "-c", SHORT_LOCK_PROGRAM], env=env, capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"gateway: another gateway uses the data folder {tmp_path}\n"


def test_first_start_without_the_store(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """A first start waits for the store, then prints the token."""
    port = reserve_port()
    shared = upstream.gateway_settings(valkey) | {"GATEWAY_REDIS_URL": f"redis://127.0.0.1:{port}"}
    with start_gateway(tmp_path, **shared) as gateway:
        wait_until(lambda: "demo.delayed" in gateway.log_path.read_text(), "a word about the store")
        assert httpx2.get(f"{gateway.ops_url}/healthz").status_code == 200
        assert httpx2.get(f"{gateway.ops_url}/readyz").status_code == 503
        with run_valkey(port=port):
            gateway.wait_ready()
            assert gateway.run_curl_example().status_code == 201
            assert gateway.stop() == 0


@contextmanager
def run_store_with_version(version: int, prefix: str, *, port: int = 0) -> Iterator[tuple[Valkey, Redis]]:
    """Run a store with data of a version under a prefix; yields a client."""
    with run_valkey(port=port) as store, Redis(unix_socket_path=str(store.socket_path)) as client:
        client.set(Keys(prefix).data_version, version)
        client.set(f"{{{prefix}}}:registry", "of another form")
        yield store, client


def read_all_keys(client: Redis) -> dict[bytes, bytes]:
    return {key: client.dump(key) for key in client.scan_iter()}  # type: ignore[misc] # redis-py's own


def is_version_error(line: str) -> bool:
    """Return whether a line reports the data version and the remedy."""
    words = (
        "has version 1,",
        f"uses version {DATA_VERSION}:",
        "`gateway export`",
        "`gateway apply`",
        "deploy/OPERATIONS.md",
    )
    return line.startswith("gateway: ") and all(word in line for word in words)


@pytest.mark.parametrize("role", ["all", "api", "worker"])
def test_store_of_another_version(tmp_path: Path, upstream: SandboxProcess, role: str) -> None:
    """A store of another version is refused in one line before serving, and stays unchanged."""
    with run_store_with_version(1, "gw") as (store, client):
        before = read_all_keys(client)
        shared = upstream.gateway_settings(store) | {"GATEWAY_KEY_PREFIX": "gw", "GATEWAY_ROLE": role}
        with start_gateway(tmp_path, **shared) as gateway:
            assert gateway.process.wait(30) == 1
        assert read_all_keys(client) == before
    (line,) = gateway.log_path.read_text().splitlines()
    assert is_version_error(line)
    assert gateway.stdout_path.read_text() == ""


def test_store_of_another_version_after_an_outage(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """An unavailable store of another version is refused once it answers, before any write."""
    port = reserve_port()
    shared = upstream.gateway_settings(valkey) | {"GATEWAY_REDIS_URL": f"redis://127.0.0.1:{port}"}
    with start_gateway(tmp_path, **shared) as gateway:
        wait_until(lambda: "demo.delayed" in gateway.log_path.read_text(), "a word about the store")
        with run_store_with_version(1, shared["GATEWAY_KEY_PREFIX"], port=port) as (_, client):
            assert gateway.process.wait(30) == 1
            assert len(read_all_keys(client)) == 2
    assert is_version_error(gateway.log_path.read_text().splitlines()[-1])
    assert "Traceback" not in gateway.log_path.read_text()


def test_replaced_store(tmp_path: Path, upstream: SandboxProcess) -> None:
    """A gateway whose store is replaced by one of another version writes nothing to it, and exits."""
    with run_valkey() as store, Redis(unix_socket_path=str(store.socket_path)) as client:
        shared = upstream.gateway_settings(store)
        mark = Keys(shared["GATEWAY_KEY_PREFIX"]).data_version
        with run_gateway(tmp_path, **shared) as gateway:
            assert gateway.run_curl_example().status_code == 201
            assert client.get(mark) == str(DATA_VERSION).encode()
            submits = upstream.count_requests("submit")
            client.pipeline(transaction=True).flushall().set(mark, 1).execute()
            with suppress(httpx2.TransportError):  # a background job may have stopped it already
                answer = gateway.run_curl_example()
                assert (answer.status_code, answer.json()["code"]) == (503, "ledger-unavailable")
            assert gateway.process.wait(30) == 1
            assert read_all_keys(client).keys() == {mark.encode()}
            assert upstream.count_requests("submit") == submits
    assert is_version_error(gateway.log_path.read_text().splitlines()[-1])


def test_two_starts_at_once(tmp_path: Path, upstream: SandboxProcess) -> None:
    """Gateways that start at once on an empty store both run."""
    with run_valkey() as store, ExitStack() as stack, Redis(unix_socket_path=str(store.socket_path)) as client:
        shared = upstream.gateway_settings(store)
        gateways = [stack.enter_context(start_gateway(tmp_path / name, **shared)) for name in ("first", "second")]
        for gateway in gateways:
            gateway.wait_ready()
        assert client.get(Keys(shared["GATEWAY_KEY_PREFIX"]).data_version) == str(DATA_VERSION).encode()
        assert [item.stop() for item in gateways] == [0, 0]


def test_damaged_sandbox(tmp_path: Path) -> None:
    """The error of a sandbox that cannot start is one line, and nothing is left running."""
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "sandbox" / "sandbox.sqlite3").write_bytes(b"no database at all" * 100)
    with start_gateway(tmp_path) as gateway:
        assert gateway.process.wait(30) == 1
    (line,) = gateway.log_path.read_text().splitlines()
    assert line.startswith("gateway: the sandbox did not start (GATEWAY_SANDBOX_PORT, ")
    assert line.endswith("file is not a database")
