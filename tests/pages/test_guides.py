"""Runs the commands and programs of the guides and the README as written, on a gateway with the sandbox."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from standardwebhooks import Webhook

from service.api.guides import GUIDE_NAMES, OPERATOR_GUIDE_NAMES
from tests.pages.node import NODE
from tests.process.gateway import GatewayProcess, run_gateway, wait_until
from tests.process.sandbox import ADMIN_TOKEN, call_admin
from tests.support.network import reserve_port

ROOT = Path(__file__).parents[2]
FOLDER = resources.files("service") / "pages" / "guides"
PHOTO = (resources.files("service.demo") / "images" / "photo.jpg").read_bytes()
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
EVENT = '{"type":"task.succeeded","data":{"id":"task_1"}}'
EXPECTED = {
    "first-task": (r'"state":"succeeded"', r'"next_cursor":', r'"code":"invalid-options"'),
    "client": (r"upscaled\.png", r"face\.png", r"day"),
    "waiting": (r"event: state\n", r"304\n"),
    "webhooks": (r"204\n",),
    "quotas": (r'"policies":\[', r"period,kind,"),
    "idempotency": (r"(?i)idempotent-replayed: true", r'"code":"not-found"'),
    "migration": (r'"err_code":0', r'"status":"\w+"', r'"state":"succeeded"'),
    "limits": (),
    "production": (r"order-4711\.1", r'"status":"ok"'),
    "operating": (
        r"1 of 1 up",
        r'"token":"igw_',
        r'"state":"read-only"',
        r"state: +read-only -> active",
        r'"deleted": "studio"',
        r"\ndemo open ",
    ),
}
"""Of each guide, what its commands print."""
RECEIVERS = {
    "python": (f"{sys.executable} receiver.py", "receiver.py"),
    "javascript": (f"{' '.join(NODE)} receiver.mjs", "receiver.mjs"),
    "go": ("go run receiver.go", "receiver.go"),
}
WINDOWS = {"python": "day", "javascript": "month", "go": "total"}
"""Of the limit of which each receiver is told, since each window is reported once."""
UNTESTED_LANGUAGES = {"http"}
"""Of blocks that only show a request or headers."""


def read_blocks(guide: str, language: str) -> Sequence[str]:
    return find_blocks(FOLDER.joinpath(f"{guide}.md").read_text("utf-8"), language)


def find_blocks(text: str, language: str) -> Sequence[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {"GATEWAY_POLL_SECONDS": "0.05", "GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN}
    with run_gateway(tmp_path_factory.mktemp("gateway"), **settings) as running:
        yield running


def run(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> str:
    """Run a command in a folder with a picture; it must succeed. Returns what it printed."""
    (folder / "photo.jpg").write_bytes(PHOTO)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # has the command `gateway`
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("guide", [*GUIDE_NAMES, *OPERATOR_GUIDE_NAMES])
def test_commands(gateway: GatewayProcess, tmp_path: Path, guide: str) -> None:
    """The commands of a guide run one after another, then its programs but the receivers."""
    variables = {"GATEWAY_URL": gateway.url, "GATEWAY_TOKEN": gateway.token}
    variables |= {"GATEWAY_OPS_HOST": "127.0.0.1", "GATEWAY_OPS_PORT": gateway.environ["GATEWAY_OPS_PORT"]}
    variables |= {"GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN}
    receiver: AbstractContextManager[str] = run_receiver("python", tmp_path) if guide == "webhooks" else nullcontext("")
    with receiver as address:
        variables |= {"WEBHOOK_SECRET": SECRET, "RECEIVER": address}
        script = re.sub(
            r"^export (\w+)=.*$",
            lambda found: f"export {found[1]}='{variables[found[1]]}'",
            "\n".join(read_blocks(guide, "sh")),
            flags=re.MULTILINE,
        )
        printed = run(["/bin/bash", "-euo", "pipefail", "-c", script], tmp_path, {})
    for pattern in EXPECTED[guide]:
        assert re.search(pattern, printed), printed
    for program in read_blocks(guide, "python") if guide != "webhooks" else ():
        assert "succeeded" in run([sys.executable, "-c", program], tmp_path, variables)


def run_in_checkout(gateway: GatewayProcess, script: str, folder: Path, **variables: str) -> str:
    """Run commands in a folder like that of `make run`, with the ports of the gateway."""
    for name in (".venv", "service"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".gateway").symlink_to(gateway.stdout_path.parent)
    ports = {name: text for name, text in gateway.environ.items() if name.endswith("_PORT")}
    return run(["/bin/bash", "-euo", "pipefail", "-c", script], folder, ports | variables)


def test_commands_of_the_readme(gateway: GatewayProcess, tmp_path: Path) -> None:
    _, tour = find_blocks((ROOT / "README.md").read_text("utf-8"), "sh")
    printed = run_in_checkout(gateway, tour, tmp_path, GATEWAY_URL=gateway.url, GATEWAY_TOKEN=gateway.token)
    assert '"state":"succeeded"' in printed
    assert '"day-tasks"' in printed
    assert (tmp_path / "result.png").stat().st_size > 10_000


def test_commands_of_the_operators_guide(gateway: GatewayProcess, tmp_path: Path) -> None:
    script = "\n".join(find_blocks((ROOT / "deploy" / "GUIDE.md").read_text("utf-8"), "sh"))
    printed = run_in_checkout(gateway, script, tmp_path, GATEWAY_ADMIN_TOKEN=ADMIN_TOKEN)
    for pattern in (r"main +open", r"shop +face-enhance", r"face-enhance +\w+"):
        assert re.search(pattern, printed), printed


@contextmanager
def run_receiver(language: str, folder: Path) -> Iterator[str]:
    """Run the program of the guide in a language; yields its address. What it prints is in `printed.txt`."""
    command, name = RECEIVERS[language]
    (program,) = read_blocks("webhooks", language)
    (folder / name).write_text(program)
    port = reserve_port()
    environment = {**os.environ, "WEBHOOK_SECRET": SECRET, "PORT": str(port), "GOCACHE": str(folder / "cache")}
    with (folder / "printed.txt").open("wb") as output:
        receiver = subprocess.Popen(
            command.split(), cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_until(lambda: responds(receiver, address), "the receiver")
        yield address
    finally:
        os.killpg(receiver.pid, 9)  # `go run` has a child
        receiver.wait()


def responds(receiver: subprocess.Popen[bytes], address: str) -> bool:
    assert receiver.poll() is None
    try:
        return bool(httpx2.post(address, content=b"{}", trust_env=False).status_code)
    except httpx2.TransportError:
        return False


@pytest.mark.parametrize("language", RECEIVERS)
def test_webhook_receivers(gateway: GatewayProcess, tmp_path: Path, language: str) -> None:
    """Each program accepts the gateway's own request, and refuses everything that is not signed as it is."""
    with run_receiver(language, tmp_path) as address:
        signed = sign(EVENT)
        assert send(address, EVENT, signed) == 204
        assert send(address, EVENT, signed | {"webhook-signature": f"v1,other {signed['webhook-signature']}"}) == 204
        assert send(address, EVENT + " ", signed) == 401
        assert send(address, EVENT, signed | {"webhook-id": "msg_2"}) == 401
        assert send(address, EVENT, sign(EVENT, age=600)) == 401
        for name in signed:
            assert send(address, EVENT, {key: value for key, value in signed.items() if key != name}) == 401
        webhook = {"url": address, "secret": SECRET, "allow": [f"127.0.0.0/8:{urlsplit(address).port}"]}
        limits = {"day": {"window": "day", "tasks": 100}}  # the README shows it
        limits[WINDOWS[language]] = {"window": WINDOWS[language], "tasks": 100, "warn_at": [1]}
        call_admin(gateway, "PATCH", "/tenants/demo", json={"webhook": webhook, "limits": [*limits.values()]})
        task = gateway.call("POST", "/v1/tasks/face-enhance", files={"image": PHOTO}).json()["id"]
        expected = {f"task.succeeded {task}", f"quota.threshold {WINDOWS[language]}-tasks"}
        wait_until(lambda: expected <= {*(tmp_path / "printed.txt").read_text().splitlines()}, "both webhooks")


def sign(body: str, age: int = 0) -> dict[str, str]:
    sent_at = datetime.now(UTC) - timedelta(seconds=age)
    signature = Webhook(SECRET).sign("msg_1", sent_at, body)
    return {"webhook-id": "msg_1", "webhook-timestamp": str(int(sent_at.timestamp())), "webhook-signature": signature}


def send(address: str, body: str, headers: Mapping[str, str]) -> int:
    return httpx2.post(address, content=body, headers=headers, trust_env=False).status_code


def test_every_block_is_run() -> None:
    for guide in (*GUIDE_NAMES, *OPERATOR_GUIDE_NAMES):
        text = FOLDER.joinpath(f"{guide}.md").read_text("utf-8")
        languages = {*re.findall(r"^```(\w+)$", text, re.MULTILINE)}
        assert languages <= {"sh", *RECEIVERS, *UNTESTED_LANGUAGES}
        assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(re.findall(r"^```\w+$", text, re.MULTILINE))
