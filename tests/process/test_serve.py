"""Start and shutdown of `gateway serve`: in development, in production, traced, with a store of another version."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest
from redis import Redis

from deploy import healthcheck
from service.clients.breaker import BREAKER_THRESHOLD
from service.crypto import generate_secret_key
from service.http_protocol import Limits
from service.storage.redis import DATA_VERSION, Keys
from tests.behaviour.requests import KEY, UNREACHABLE_LIMITS, make_jpeg
from tests.cli.conftest import run_command
from tests.process.gateway import (
    HTTP,
    TIMEOUT_SECONDS,
    GatewayProcess,
    gateway_command,
    is_alive,
    run_gateway,
    start_gateway,
    wait_until,
)
from tests.process.sandbox import ADMIN_TOKEN, SandboxProcess, advance_clock, call_admin, run_sandbox
from tests.support.network import exhaust_descriptors
from tests.support.traces import run_collector
from tests.support.valkey import Valkey, run_valkey

HEAD_TIME = timedelta(seconds=Limits().head_seconds)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxProcess]:
    with run_sandbox() as sandbox:
        yield sandbox


def test_restart_after_a_kill_keeps_token_tasks_and_usage(tmp_path: Path) -> None:
    with run_gateway(tmp_path) as gateway:
        token, answer = gateway.token, gateway.run_curl_example()
        assert answer.status_code == 201, answer.text
        task = answer.json()["links"]["self"]
        assert gateway.wait_finished(task)["state"] == "succeeded"
        running = gateway.run_curl_example().json()["links"]["self"]
        assert gateway.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not any(is_alive(pid) for pid in gateway.child_pids), "the end of its children")
    log = gateway.log_path.read_text()
    assert not any(text in log for text in ("Traceback", "\x1b[", token))
    with run_gateway(tmp_path) as gateway:
        assert gateway.token == token
        assert gateway.call("GET", task).json()["state"] == "succeeded"
        assert gateway.wait_finished(running)["state"] == "succeeded"
        assert gateway.stop(signal.SIGINT) == 0
        assert not any(is_alive(pid) for pid in gateway.child_pids)


def production_settings(valkey: Valkey) -> dict[str, str]:
    return {
        "GATEWAY_ENV": "production",
        "GATEWAY_REDIS_URL": valkey.url,
        "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:9",
        "GATEWAY_SECRET_KEYS": generate_secret_key(),
        "GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN,
        "GATEWAY_KEY_PREFIX": "production-test",
        "GATEWAY_ROLE": "api",
    }


def test_production_generates_nothing_and_logs_json(tmp_path: Path, valkey: Valkey) -> None:
    settings = production_settings(valkey)
    key = settings["GATEWAY_SECRET_KEYS"]
    with run_gateway(tmp_path, **settings) as gateway:
        assert gateway.child_pids == []
        env = gateway.environ | {"UPSTREAM_KEY": "the-user-key-of-the-account"}
        run_command("account", "create", "main", "--user-key-env", "UPSTREAM_KEY", env=env)
        run_command("tenant", "create", "shop", "--account", "main", "--limit", "day:tasks=2", env=env)
        gateway.token = run_command("token", "create", "shop", env=env).stdout.strip()
        gateway.call("GET", "/v1/quota").raise_for_status()
        assert gateway.call("GET", "/admin/v1/accounts").status_code == 404
        assert gateway.stop() == 0
    lines = gateway.log_path.read_text().splitlines()
    events = {json.loads(line)["event"] for line in lines}
    assert {"gateway.started", "account.updated", "token.created", "request.ended", "shutdown.begun"} <= events
    for secret in (ADMIN_TOKEN, key, "the-user-key-of-the-account", gateway.token):
        assert all(secret not in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "out.txt"]


def test_crash_leaves_no_core_dump(tmp_path: Path, valkey: Valkey) -> None:
    """In production the memory, which has secrets, is not dumped, whatever the limit of core dumps is."""
    command = 'ulimit -c unlimited; cd "$0"; exec "$@"'
    words = ["sh", "-c", command, str(tmp_path), sys.executable, "-m", "service", "serve"]
    with run_gateway(tmp_path, words, **production_settings(valkey)) as gateway:
        gateway.process.send_signal(signal.SIGABRT)
        ended = os.waitid(os.P_PID, gateway.process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert (ended.si_code, ended.si_status) == (os.CLD_KILLED, signal.SIGABRT)  # not CLD_DUMPED


def test_api_and_worker_started_at_once_share_the_work(tmp_path: Path, upstream: SandboxProcess) -> None:
    """The worker has no tenants' port, and at the operators' port only health and metrics."""
    with run_valkey() as store, socket.create_server(("127.0.0.1", 0)) as taken:
        shared = upstream.gateway_settings(store)
        port = str(taken.getsockname()[1])  # which a worker does not open
        with (
            start_gateway(tmp_path / "api", GATEWAY_ROLE="api", **shared) as api,
            start_gateway(tmp_path / "worker", GATEWAY_ROLE="worker", GATEWAY_PORT=port, **shared) as worker,
        ):
            for gateway in (api, worker):
                gateway.wait_ready()
            task = api.run_curl_example().json()["links"]["self"]
            assert api.wait_finished(task)["state"] == "succeeded"
            worker.wait_for_log("task.finished")
            assert "task.finished" not in api.log_path.read_text()
            admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
            paths = ("/healthz", "/readyz", "/metrics", "/admin/v1/accounts", "/docs", "/openapi.json")
            statuses = [HTTP.get(worker.ops_url + path, headers=admin).status_code for path in paths]
            assert statuses == [200, 200, 200, 404, 404, 404]
            assert [gateway.stop() for gateway in (api, worker)] == [0, 0]


def test_health_check_of_the_image(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    def run_check(host: str) -> int:
        environ = gateway.environ | {"GATEWAY_OPS_HOST": host}
        return subprocess.run([sys.executable, healthcheck.__file__], env=environ, cwd=ROOT, check=False).returncode

    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway:
        assert gateway.ops_url
        assert [run_check(host) for host in ("127.0.0.1", "0.0.0.0")] == [0, 0]
        gateway.stop()
        assert run_check("127.0.0.1") == 1


def test_lack_of_descriptors_costs_nothing(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    with (
        run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway,
        httpx2.Client(base_url=gateway.url, timeout=TIMEOUT_SECONDS, trust_env=False) as client,
    ):
        client.headers = {"Authorization": f"Bearer {gateway.token}", "Idempotency-Key": KEY}

        def submit() -> httpx2.Response:
            return client.post("/v1/tasks/face-enhance", files={"image": ("image.jpg", make_jpeg(b"a"))})

        gateway.run_curl_example().raise_for_status()  # so that the scripts are loaded
        with ThreadPoolExecutor(20) as threads:  # so that there are connections to the store
            list(threads.map(lambda _: gateway.call("GET", "/v1/quota"), range(20)))
        client.get("/v1/quota").raise_for_status()
        before = upstream.count_requests("submit")
        with exhaust_descriptors(gateway.process.pid):
            refused = [submit() for _ in range(BREAKER_THRESHOLD + 1)]
        assert {(item.status_code, item.json()["code"]) for item in refused} == {(503, "upstream-unavailable")}
        accepted = submit()
        assert (accepted.status_code, "idempotent-replayed" in accepted.headers) == (201, False)
        assert upstream.count_requests("submit") == before + 1


def test_silent_connections(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    """More connections than descriptors leave some for operators and tasks, and do not keep tenants out."""
    upstream.set_faults(seconds=2)  # the connections are open by then
    words = ["prlimit", "--nofile=256:256", *gateway_command("serve")]
    with run_gateway(tmp_path, words, **upstream.gateway_settings(valkey)) as gateway, ExitStack() as stack:
        task = gateway.run_curl_example().json()["links"]["self"]
        address = httpx2.URL(gateway.url)
        for _ in range(400):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex((address.host, address.port or 0))
        opened = Path(f"/proc/{gateway.process.pid}/fd")
        wait_until(lambda: len(list(opened.iterdir())) > 128, "the cap")
        admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        for _ in range(3):
            for path in ("/healthz", "/metrics", "/admin/v1/accounts"):
                assert HTTP.get(gateway.ops_url + path, headers=admin).status_code == 200
        gateway.wait_for_log("task.finished")
        response = gateway.call("GET", task)  # silent connections make room
        assert (response.status_code, response.elapsed < HEAD_TIME) == (200, True)
        assert "can't be accepted" not in gateway.log_path.read_text()


def expect_start_error(gateway: GatewayProcess) -> str:
    """Require that a gateway ends with an error of one line; return that line."""
    assert gateway.process.wait(TIMEOUT_SECONDS) == 1
    log = gateway.log_path.read_text()
    assert "Traceback" not in log
    last = log.splitlines()[-1]
    assert last.startswith("gateway: ")
    return last


@pytest.mark.parametrize("name", ["GATEWAY_PORT", "GATEWAY_OPS_PORT"])
def test_port_in_use(tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with start_gateway(tmp_path, **{name: port}) as gateway:
            error = expect_start_error(gateway)
    assert (port in error, name in error) == (True, True)


def test_sandbox_takes_a_free_port_and_the_demo_tenant_has_limits(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with run_gateway(tmp_path, GATEWAY_SANDBOX_PORT=port) as gateway:
            gateway.wait_for_log("sandbox.port_taken")
            assert gateway.run_curl_example().status_code == 201
            assert {policy["used"] for policy in gateway.call("GET", "/v1/quota").json()["policies"]} == {1}


def test_damaged_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "sandbox" / "sandbox.sqlite3").write_bytes(b"no database at all" * 100)
    with start_gateway(tmp_path) as gateway:
        assert expect_start_error(gateway).endswith("file is not a database")


def test_first_start_waits_for_the_store(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    settings = upstream.gateway_settings(valkey) | {"GATEWAY_REDIS_URL": f"unix://{tmp_path / 'store'}"}
    with start_gateway(tmp_path, **settings) as gateway:
        gateway.wait_for_log("demo.delayed")
        assert HTTP.get(f"{gateway.ops_url}/healthz").status_code == 200
        assert HTTP.get(f"{gateway.ops_url}/readyz").status_code == 503
        (tmp_path / "store").symlink_to(valkey.socket_path)
        gateway.wait_ready()
        assert gateway.run_curl_example().status_code == 201


def expect_version_error(gateway: GatewayProcess) -> None:
    line = expect_start_error(gateway)
    for words in ("has version 1,", f"uses version {DATA_VERSION}:", "deploy/OPERATIONS.md"):
        assert words in line


@pytest.mark.parametrize("role", ["worker", "all"])
def test_store_of_another_version_is_refused_unchanged(tmp_path: Path, upstream: SandboxProcess, role: str) -> None:
    with run_valkey() as store, Redis(unix_socket_path=str(store.socket_path)) as client:
        settings = upstream.gateway_settings(store) | {"GATEWAY_REDIS_URL": f"unix://{tmp_path / 'store'}"}
        keys = Keys(settings["GATEWAY_KEY_PREFIX"])
        client.mset({keys.data_version: "1", keys.registry: "of another form"})
        if role == "worker":
            (tmp_path / "store").symlink_to(store.socket_path)
        with start_gateway(tmp_path, GATEWAY_ROLE=role, **settings) as gateway:
            if role == "all":  # the store is away at the start
                gateway.wait_for_log("demo.delayed")
                (tmp_path / "store").symlink_to(store.socket_path)
            expect_version_error(gateway)
        assert set(client.keys()) == {keys.data_version.encode(), keys.registry.encode()}
        assert client.mget(keys.data_version, keys.registry) == [b"1", b"of another form"]


def test_store_replaced_by_another_version_is_not_written(tmp_path: Path, upstream: SandboxProcess) -> None:
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
            expect_version_error(gateway)
            assert client.keys() == [mark.encode()]
            assert upstream.count_requests("submit") == submits


def test_last_spans_are_sent_at_shutdown(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    with run_collector() as collector:
        settings = upstream.gateway_settings(valkey) | {"GATEWAY_TRACES_URL": collector.url}
        with run_gateway(tmp_path, **settings) as gateway:
            gateway.wait_finished(gateway.run_curl_example().json()["links"]["self"])
            assert gateway.stop() == 0
        request = collector.get_span("POST /v1/tasks/upscale")
        assert request.resource["service.name"] == "imaging-gateway"
        links = {link for check in collector.find_spans("check task") for link in check.links}
        assert links == {(request.trace_id, request.span_id)}
        assert gateway.token.encode() not in b"".join(collector.bodies)
        log = gateway.log_path.read_text()
        assert (f"trace_id={request.trace_id}" in log, "traces." in log) == (True, False)


SHORT_SHUTDOWN_PROGRAM = """
from importlib import import_module
from service.cli import main
import_module("service.cli.serve")._SHUTDOWN_MARGIN_SECONDS = 1 - 2 * 90
main(["serve"])
"""


def is_closed(url: str) -> bool:
    """Return whether the port refuses connections; one accepted while it closes is cut off instead."""
    try:
        HTTP.get(f"{url}/healthz")
    except httpx2.TransportError as error:
        return isinstance(error, httpx2.ConnectError)
    return False


def read_usage(gateway: GatewayProcess) -> tuple[int, int, int]:
    """Return the used, held and active tasks of the demo tenant."""
    tasks, active = gateway.call("GET", "/v1/quota").json()["policies"]
    return tasks["used"], tasks["reserved"], active["used"]


def test_shutdown_ends_waits_and_finishes_requests(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    upstream.set_faults(seconds=3_600)
    with run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway, ThreadPoolExecutor(7) as threads:
        links = gateway.run_curl_example().json()["links"]
        before = upstream.count_requests("submit")
        waiting = [threads.submit(gateway.call, "GET", links["self"], headers={"Prefer": "wait=60"}) for _ in range(3)]
        waiting += [threads.submit(gateway.call, "GET", links["events"]) for _ in range(3)]
        wait_until(lambda: "\ngateway_waiting_clients 6.0\n" in HTTP.get(f"{gateway.ops_url}/metrics").text, "clients")
        upstream.set_faults({"on": "submit", "times": 1, "latency": 1.2})
        submitting = threads.submit(gateway.run_curl_example)
        wait_until(lambda: upstream.count_requests("submit") > before, "the submit")
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: HTTP.get(f"{gateway.ops_url}/readyz").status_code == 503, "the draining")
        wait_until(lambda: is_closed(gateway.url), "the end of listening")
        assert submitting.result().status_code == 201
        assert [answer.result().status_code for answer in waiting] == [200] * 6
        assert gateway.process.wait(TIMEOUT_SECONDS) == 0
    log = gateway.log_path.read_text()
    assert ("Traceback" in log, "returned without" in log) == (False, False)


def test_second_signal_ends_at_once(tmp_path: Path, valkey: Valkey, upstream: SandboxProcess) -> None:
    shared = upstream.gateway_settings(valkey)
    with run_gateway(tmp_path / "first", **shared) as gateway, ThreadPoolExecutor() as threads:
        call_admin(gateway, "PUT", "/tenants/demo", json={"accounts": ["demo"], **UNREACHABLE_LIMITS})
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
    with run_valkey() as store, run_gateway(tmp_path, **upstream.gateway_settings(store)) as gateway:
        if is_dead:
            store.kill()
        else:
            store.suspend()
        assert gateway.stop() == 0
        assert "Traceback" not in gateway.log_path.read_text()


def test_pending_settlements_delay_the_shutdown_for_a_limited_time(tmp_path: Path, upstream: SandboxProcess) -> None:
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


def test_signal_during_start_ends_silently(tmp_path: Path) -> None:
    with start_gateway(tmp_path) as gateway:
        listed = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children")
        wait_until(lambda: bool(listed.read_text()), "a child")
        children = [int(pid) for pid in listed.read_text().split()]
        assert gateway.stop() == 0
        assert not any(is_alive(child) for child in children)
    assert (gateway.stdout_path.read_text(), gateway.log_path.read_text()) == ("", "")
