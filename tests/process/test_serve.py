"""`gateway serve` in development and in production."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service import __version__
from service.crypto import generate_secret_key
from tests.process.gateway import gateway_command, gateway_environment, is_alive, run_gateway, start_gateway, wait_until
from tests.support.valkey import Valkey

PROBE = """
import sys
from service.cli import main
try:
    main(["--help"])
except SystemExit:
    print([name for name in ("cv2", "httpx2", "litestar", "numpy", "redis", "uvicorn") if name in sys.modules])
"""
ADMIN_TOKEN = "an-admin-token-of-forty-characters-or-so"


def run_command(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(gateway_command(*words), env=env, capture_output=True, text=True, timeout=60, check=False)


def test_first_start_and_second(tmp_path: Path) -> None:
    """The printed command works as pasted; a second start keeps the token, the task and the usage."""
    with run_gateway(tmp_path) as gateway:
        token, answer = gateway.token, gateway.run_curl_example()
        assert answer.status_code == 201, answer.text
        task = answer.json()["links"]["self"]
        assert gateway.wait_finished(task)["state"] == "succeeded"
        ports = {name: gateway.environ[name] for name in ("GATEWAY_PORT", "GATEWAY_OPS_PORT", "GATEWAY_SANDBOX_PORT")}
        running = gateway.run_curl_example().json()["links"]["self"]
        assert gateway.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not any(is_alive(pid) for pid in gateway.child_pids), "the end of its children")
    assert "Traceback" not in gateway.log_path.read_text()
    assert "\x1b[" not in gateway.log_path.read_text()
    assert token not in gateway.log_path.read_text()
    with run_gateway(tmp_path, **ports) as gateway:
        assert gateway.token == token
        assert gateway.call("GET", task).json()["state"] == "succeeded"
        assert gateway.wait_finished(running)["state"] == "succeeded"
        assert gateway.stop(signal.SIGINT) == 0
        assert not any(is_alive(pid) for pid in gateway.child_pids)


def test_production(tmp_path: Path, valkey: Valkey) -> None:
    """With all settings nothing is generated or started, and the log is one JSON object per line."""
    key = generate_secret_key()
    settings = {
        "GATEWAY_ENV": "production",
        "GATEWAY_REDIS_URL": valkey.url,
        "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:9",
        "GATEWAY_SECRET_KEYS": key,
        "GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN,
        "GATEWAY_KEY_PREFIX": "production-test",
        "GATEWAY_ROLE": "api",
    }
    with run_gateway(tmp_path, **settings) as gateway:
        assert gateway.child_pids == []
        env = dict(gateway.environ) | {"UPSTREAM_KEY": "the-user-key-of-the-account"}
        for words in (
            ("account", "create", "main", "--user-key-env", "UPSTREAM_KEY"),
            ("tenant", "create", "shop", "--account", "main", "--limit", "day:tasks=2"),
        ):
            done = run_command(*words, env=env)
            assert done.returncode == 0, done.stderr
        gateway.token = run_command("token", "create", "shop", env=env).stdout.strip()
        gateway.call("GET", "/v1/quota").raise_for_status()
        assert gateway.call("GET", "/admin/v1/accounts").status_code == 404
        assert gateway.stop() == 0
    lines = gateway.log_path.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    result = {event["event"] for event in events}
    assert {
        "gateway.started",
        "account.updated",
        "tenant.updated",
        "token.created",
        "request.ended",
        "shutdown.begun",
    } <= result
    for secret in (ADMIN_TOKEN, key, "the-user-key-of-the-account", gateway.token):
        assert all(secret not in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "out.txt"]


def test_worker_checks_tasks_of_the_api(tmp_path: Path) -> None:
    """An api and a worker process do the main job together; the worker has no tenants' port."""
    with run_gateway(tmp_path / "all") as local:
        sandbox = f"http://127.0.0.1:{local.environ['GATEWAY_SANDBOX_PORT']}"
        shared = {
            "GATEWAY_REDIS_URL": f"unix://{tmp_path / 'all' / 'valkey.sock'}",
            "GATEWAY_UPSTREAM_URL": sandbox,
            "GATEWAY_UPSTREAM_USER_KEY": "sandbox-demo",
            "GATEWAY_KEY_PREFIX": "apart",
        }
        with run_gateway(tmp_path / "api", GATEWAY_ROLE="api", **shared) as api:
            task = api.run_curl_example().json()["links"]["self"]
            for name in ("secret.key", "admin.token"):
                (tmp_path / "worker").mkdir(exist_ok=True)
                (tmp_path / "worker" / name).write_bytes((tmp_path / "api" / name).read_bytes())
            with run_gateway(tmp_path / "worker", GATEWAY_ROLE="worker", **shared) as worker:
                assert api.wait_finished(task)["state"] == "succeeded"
                with pytest.raises(ConnectionRefusedError), socket.socket() as client:
                    client.connect(("127.0.0.1", int(worker.environ["GATEWAY_PORT"])))
                assert "task.finished" in worker.log_path.read_text()
                assert "task.finished" not in api.log_path.read_text()


@pytest.mark.parametrize("name", ["GATEWAY_PORT", "GATEWAY_OPS_PORT", "GATEWAY_SANDBOX_PORT"])
def test_port_in_use(tmp_path: Path, name: str) -> None:
    """The error names the port in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with start_gateway(tmp_path, **{name: port}) as gateway:
            assert gateway.process.wait(60) == 1
        last = gateway.log_path.read_text().splitlines()[-1]
        assert last.startswith("gateway: ")
        assert port in last or name in last
        assert "Traceback" not in gateway.log_path.read_text()


def test_all_settings_errors(tmp_path: Path) -> None:
    """Invalid settings are reported at once, one per line, and nothing is started."""
    done = run_command(
        "serve", env=gateway_environment(tmp_path, GATEWAY_PORT="http", GATEWAY_POLL_SECONDS="0", GATEWAY_PROT="1")
    )
    assert done.returncode == 2
    assert [line.split()[1] for line in done.stderr.splitlines()] == sorted(
        ["GATEWAY_PROT", "GATEWAY_PORT", "GATEWAY_POLL_SECONDS"],
        key=["GATEWAY_PROT", "GATEWAY_PORT", "GATEWAY_POLL_SECONDS"].index,
    )
    assert list(tmp_path.iterdir()) == []


def test_small_commands(tmp_path: Path) -> None:
    """Version, help and OpenAPI documents."""
    env = gateway_environment(tmp_path)
    assert run_command("--version", env=env).stdout == f"gateway, version {__version__}\n"
    for name in ("serve", "demo", "sandbox", "openapi", "account", "tenant", "token"):
        assert name in run_command("--help", env=env).stdout
    written = Path(__file__).parents[2] / "openapi"
    assert run_command("openapi", "--folder", str(written), "--check", env=env).returncode == 0
    (tmp_path / "gateway.yaml").write_text("stale")
    stale = run_command("openapi", "--folder", str(tmp_path), "--check", env=env)
    assert stale.returncode == 1
    assert "make openapi" in stale.stderr


def test_demo(tmp_path: Path) -> None:
    """The demo succeeds; without a gateway it prints one line that names how to start one."""
    alone = run_command("demo", "--folder", str(tmp_path / "results"), env=gateway_environment(tmp_path))
    assert alone.returncode == 1
    assert "make run" in alone.stdout + alone.stderr
    with run_gateway(tmp_path / "data", GATEWAY_POLL_SECONDS="0.2") as gateway:
        done = run_command("demo", "--folder", str(tmp_path / "results"), env=dict(gateway.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("upscale", "vectorize", "face-enhance", "seamless"):
        assert f"{kind}" in done.stdout
    assert {path.name for path in (tmp_path / "results").iterdir()} >= {
        "upscale-image.png",
        "vectorize-vector.svg",
        "face-enhance-image.png",
        "seamless-grid.png",
    }


def test_help_is_quick() -> None:
    """`gateway --help` imports no module that only serving needs."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
