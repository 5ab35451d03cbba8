"""Commands of callers against a gateway in the process: submit, tasks, task, download, quota, usage, completion."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.client import calls
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import ADMIN_TOKEN
from tests.cli.conftest import Shell, run_command, run_shell
from tests.contract.scripted_server import file_response, reply_and_close, run_server
from tests.support.images import make_png
from tests.support.proxy import Proxy
from tests.support.valkey import Valkey

PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"
TOKENS = {"GATEWAY_TOKEN": "a", "GATEWAY_ADMIN_TOKEN": "b"}


@pytest.fixture
async def shell(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shell]:
    """A caller's shell, whose tasks run to their ends."""
    monkeypatch.setattr(calls, "_FIRST_BACKOFF_SECONDS", 0.01)
    async with run_shell(valkey, GATEWAY_POLL_SECONDS="0.05") as running, running.gateway.services.run_jobs():
        running.environ = {"GATEWAY_URL": running.gateway.url, "GATEWAY_TOKEN": running.gateway.token}
        yield running


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two images."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("photo.png", "face.png")):
        (tmp_path / name).write_bytes(make_png(24 + number))
    return tmp_path


@pytest.mark.smoke
async def test_submit_writes_results_and_pays_once(shell: Shell, folder: Path) -> None:
    (_, (name, state, cost, results, task_id)) = await shell.run_table(
        "submit", "upscale", "photo.png", "--scale", "2", "--vector", "--wait", "-o", "out.png"
    )
    assert (name, state, cost[:5], results) == ("photo.png", "succeeded", "1 use", "out.png, out-vector.svg")
    assert (folder / "out.png").read_bytes().startswith(PNG)
    assert b"<svg" in (folder / "out-vector.svg").read_bytes()

    same = ["submit", "upscale", "photo.png", "--scale", "2.0", "--noise", "1.003", "--vector", "-q"]
    assert (await shell.run(*same)).stdout == f"{task_id}\n"
    assert await shell.gateway.upstream.count_submits() == 1
    anew = (await shell.run(*same, "--new")).stdout
    other = (await shell.run(*same, "--metadata", "order=4711")).stdout
    assert len({task_id, anew.strip(), other.strip()}) == await shell.gateway.upstream.count_submits() == 3
    assert (await shell.run_json("task", other.strip()))["metadata"] == {"order": "4711"}


async def test_several_files(shell: Shell, folder: Path) -> None:
    """Each has its task, result and error."""
    (folder / "broken.png").write_bytes(PNG)
    arguments = ["submit", "seamless", "photo.png", "broken.png", "face.png", "-o", "results/", "--json", "-j", "1"]
    result = await shell.run(*arguments, code=4)
    photo, broken, face = json.loads(result.stdout)
    assert [photo["task"]["state"], broken["task"], face["task"]["state"]] == ["succeeded", None, "succeeded"]
    assert photo["results"] == ["results/photo-seamless.png", "results/photo-seamless-grid.png"]
    assert (broken["error"]["code"], photo["error"], photo["replayed"]) == ("unsupported-media-type", None, False)
    assert result.stderr.startswith("gateway: broken.png: ")
    assert len(list((folder / "results").iterdir())) == 4
    again = json.loads((await shell.run(*arguments, code=4)).stdout)
    assert (again[0]["replayed"], again[0]["task"]) == (True, photo["task"])


async def test_addresses_of_images(shell: Shell, folder: Path) -> None:
    """They are sent as they are; the same address is the same submission, and its query is not shown."""
    async with run_server(reply_and_close(file_response())) as images:
        await shell.gateway.put_tenant(allow_image_url=[f"127.0.0.0/8:{urlsplit(images.url).port}"])
        url = f"{images.url}/pictures/cat.png?signature=hush"
        submit = ["submit", "seamless", url, "photo.png", "-o", "results/"]
        (_, (name, state, _, results, task), _) = await shell.run_table(*submit)
        assert (name, state) == (f"{images.url}/pictures/cat.png", "succeeded")
        assert results == "results/cat-seamless.png, results/cat-seamless-grid.png"
        assert (folder / "results" / "cat-seamless.png").read_bytes().startswith(PNG)
    again = await shell.run("submit", "seamless", url, "--quiet")
    assert (again.stdout, len(images.requests)) == (f"{task}\n", 1)
    refused = await shell.run("submit", "seamless", url, "--new", code=4)
    assert "hush" not in refused.stderr
    await shell.run("submit", "seamless", "ftp://images.test/cat.png", code=2)


async def test_standard_input_and_output(shell: Shell) -> None:
    result = await shell.run("submit", "face-enhance", "-", "-o", "-", stdin=make_png())
    assert (result.stdout_bytes[:4], result.stderr) == (PNG, "")


def test_interrupted_while_reading_standard_input() -> None:
    own = {"GATEWAY_URL": "http://127.0.0.1:1", "GATEWAY_TOKEN": "t", "PYTHONPATH": str(Path(__file__).parents[2])}
    environ = os.environ | own
    reading, writing = os.pipe()
    arguments = [sys.executable, "-m", "service", "submit", "upscale", "-", "-o", "out.png"]
    with subprocess.Popen(arguments, stdin=reading, stderr=subprocess.PIPE, env=environ, text=True) as process:
        os.close(reading)
        os.write(writing, b"x" * 200_000)  # more than a pipe holds: it reads
        time.sleep(0.5)  # until it waits for more
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 130
        finally:
            os.close(writing)
            process.kill()
        assert process.stderr
        assert process.stderr.read().startswith("gateway: Interrupted.")


async def test_output_into_a_pipe_or_a_link(shell: Shell, folder: Path) -> None:
    """Neither is replaced; a pipe receives the main result."""
    os.mkfifo(folder / "pipe")
    reading = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    await shell.run("submit", "seamless", "photo.png", "-o", "pipe")
    assert os.read(reading, 4) == PNG
    os.close(reading)
    (folder / "out.png").symlink_to("linked.png")
    await shell.run("submit", "seamless", "photo.png", "-o", "out.png")
    assert (folder / "linked.png").read_bytes().startswith(PNG)
    names = {"photo.png", "face.png", "pipe", "out.png", "linked.png", "out-grid.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "pipe").is_fifo()
    assert (folder / "out.png").is_symlink()


async def test_lost_answer_is_paid_for_once(shell: Shell) -> None:
    proxy = Proxy(urlsplit(shell.gateway.url).port or 0)
    async with proxy.serve():
        shell.environ["GATEWAY_URL"] = f"http://127.0.0.1:{proxy.port}"
        losing = asyncio.create_task(proxy.lose_answers(3_600))
        submitting = asyncio.create_task(shell.run("submit", "upscale", "photo.png", "-o", "out.png"))
        await wait_until(lambda: proxy.resets > 0)
        losing.cancel()
        await submitting
    assert await shell.gateway.upstream.count_submits() == 1


async def test_new_submission_without_an_answer_names_its_key(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated with --new it would be paid for twice."""
    monkeypatch.setattr(calls, "_MAX_CONNECT_ATTEMPTS", 1)
    proxy = Proxy(urlsplit(shell.gateway.url).port or 0)
    url = shell.environ["GATEWAY_URL"]
    async with proxy.serve():
        shell.environ["GATEWAY_URL"] = f"http://127.0.0.1:{proxy.port}"
        losing = asyncio.create_task(proxy.lose_answers(3_600))
        submitting = shell.run("submit", "upscale", "photo.png", "--new", "--timeout", "1", code=6)
        result = await submitting
        losing.cancel()
    shell.environ["GATEWAY_URL"] = url
    key = result.stderr.partition("--idempotency-key ")[2].split()[0]
    await shell.run("submit", "upscale", "photo.png", "--idempotency-key", key)
    assert await shell.gateway.upstream.count_submits() == 1


async def test_unknown_outcome_is_not_sent_again(shell: Shell) -> None:
    await shell.gateway.upstream.lose_next_response()
    await shell.run("submit", "upscale", "photo.png", code=6)
    result = await shell.run("submit", "upscale", "photo.png", "--json", code=6)
    submission = json.loads(result.stdout)[0]["error"]["submission_id"]
    assert f"`gateway submission {submission}`" in result.stderr
    assert (await shell.run_record("submission", submission))["outcome:"] == "unknown"
    assert await shell.gateway.upstream.count_submits() == 1


async def test_exit_codes(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_MAX_CONNECT_ATTEMPTS", 1)
    await shell.gateway.upstream.fail_next_task()
    assert "--new" not in (await shell.run("submit", "upscale", "photo.png", "--wait", code=1)).stderr
    assert "--new" in (await shell.run("submit", "upscale", "photo.png", "--wait", code=1)).stderr
    failed = (await shell.run("submit", "upscale", "photo.png", "-q")).stdout.strip()
    await shell.run("task", failed)
    for command in ("task", "download"):
        await shell.run(command, failed, *(["--wait"] if command == "task" else []), code=1)
    await shell.run("submit", "upscale", "photo.png", "--model", "no-such", code=4)
    await shell.run("task", "task_1", code=4)
    await shell.gateway.upstream.keep_running()
    running = await shell.run("submit", "upscale", "face.png", "--wait", "--timeout", "0", "-q", code=3)
    await shell.run("task", running.stdout.strip(), "--wait", "--timeout", "0", code=3)
    await shell.run("submit", "upscale", "photo.png", "--prompt", "\udcff", code=2)
    shell.environ["GATEWAY_URL"] = "http://127.0.0.1:1"
    await shell.run("tasks", code=5)
    await shell.run("submit", "upscale", "photo.png", code=5)
    shell.environ["GATEWAY_URL"] = "nowhere"
    await shell.run("tasks", code=2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("submit upscale", "FILE"),
        ("submit upscale none.png", "none.png"),
        ("submit upscale photo.png --scale 9", "--scale must be a number from 1 to 8"),
        ("submit upscale photo.png --steps 1.5", "--steps must be a whole number from 20 to 40"),
        ("submit seamless photo.png --scale 2", "--scale"),
        ("submit upscale photo.png --metadata x", "--metadata"),
        ("submit upscale photo.png face.png -o x.png", "folder"),
        ("submit upscale photo.png face.png --idempotency-key x", "--idempotency-key"),
        ("submit upscale photo.png --idempotency-key ü", "--idempotency-key"),
        ("submit upscale photo.png --new --idempotency-key x", "--idempotency-key"),
        ("submit upscale photo.png --json -q", "--quiet"),
        ("submit upscale photo.png -o photo.png", "photo.png"),
        ("submit upscale photo.png -o none/x.png", "none/x.png"),
        ("submit upscale photo.png ./photo.png -o .", "photo"),
        ("submit upscale - -", "standard input"),
        ("download a b -o x.png", "folder"),
        ("download a -o - --json", "--json"),
        ("usage --csv --json", "--csv"),
    ],
)
def test_usage_errors(arguments: str, named: str) -> None:
    """Without a request: the exit code of an unreachable gateway would be 5."""
    environ = {"GATEWAY_URL": "http://127.0.0.1:1", "GATEWAY_TOKEN": "t"}
    assert named in run_command(*arguments.split(), code=2, env=environ).stderr


async def test_tasks_limits_and_usage(shell: Shell, folder: Path) -> None:
    await shell.gateway.put_tenant(limits=[{"window": "total", "tasks": 5}])
    ids = (await shell.run("submit", "vectorize", "photo.png", "face.png", "--wait", "-q")).stdout.split()
    lines = (await shell.run_table("tasks", "--state", "succeeded"))[1:]
    assert {line[-1] for line in lines} == set(ids)
    assert len(await shell.run_json("tasks", "--limit", "1")) == 1
    record = await shell.run_record("task", ids[0])
    assert (record["kind:"], record["state:"], record["options:"]) == ("vectorize", "succeeded", "colors=5")
    assert (await shell.run("download", ids[0], "-o", "x.svg")).stdout == "x-image.png\nx.svg\n"
    saved = await shell.run_json("download", *ids, "--name", "vector")
    assert [item["task"] for item in saved] == ids
    assert all(name.endswith(".svg") and (folder / name).exists() for item in saved for name in item["files"])
    assert (
        "x.png holds image/svg+xml" in (await shell.run("download", ids[0], "-o", "x.png", "--name", "vector")).stderr
    )
    assert (await shell.run("download", ids[0], "-o", "-")).stdout_bytes == (folder / "x.svg").read_bytes()
    await shell.run("download", ids[0], "--name", "grid", code=2)
    assert (await shell.run_table("quota"))[1][:6] == ["total-tasks", "tasks", "5", "2", "0", "3"]
    assert (await shell.run_json("quota"))["account"] == {"can_pay": True, "look_again_at": None}
    head, line = (await shell.run_table("usage", "--interval", "total"))[2:4]
    assert (head[:3], line[1:4]) == (["PERIOD", "KIND", "RUNNING"], ["vectorize", "0", "2"])
    assert (await shell.run_json("usage", "--group-by", "none"))["total"]["charged"]["tasks"] == 2
    assert (await shell.run("usage", "--csv", "--from", lines[0][0][:10])).stdout.startswith("period,kind,")
    await shell.gateway.put_tenant(limits=[{"window": "day", "tasks": 0}])
    assert "day-tasks resets at 20" in (await shell.run("submit", "upscale", "photo.png", "--new", code=4)).stderr


async def test_set_token_decides_whose_command_it_is(shell: Shell) -> None:
    operator = {"GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN, "GATEWAY_OPS_PORT": str(urlsplit(shell.gateway.ops_url).port)}
    task_id = (await shell.run("submit", "vectorize", "photo.png", "--wait", "-q")).stdout.strip()
    assert "tenant" not in (await shell.run_json("usage"))["items"][0]
    shell.environ |= operator
    for command in ("usage", "quota", f"task {task_id}", f"submission {task_id}"):
        assert "--as" in (await shell.run(*command.split(), code=2)).stderr
    assert (await shell.run_json("task", "show", task_id))["tenant"] == "shop"  # operators have no other `task`
    for option in (["--as", "operator"], ["--as=operator"]):
        assert (await shell.run_json("usage", *option))["items"][0]["tenant"] == "shop"
    assert "tenant" not in (await shell.run_json("task", task_id, "--as", "caller"))
    assert "policies" in await shell.run_json("quota", "shop", "--as", "operator")
    del shell.environ["GATEWAY_TOKEN"]
    assert (await shell.run_json("usage"))["items"][0]["tenant"] == "shop"
    await shell.run("task", task_id, code=2)


def test_whose_help_is_shown() -> None:
    caller, operator = ({name: value} for name, value in TOKENS.items())
    for environ, text in (
        (caller, "your tasks"),
        (operator, "deleted ones"),
        ({}, "deleted ones"),
        (TOKENS, "deleted"),
    ):
        assert text in run_command("usage", "--help", env=environ).stdout
    assert "your task" in run_command("task", "task_1", "--help").stdout


async def test_token_of_a_gateway_in_development(shell: Shell, folder: Path) -> None:
    url, token = shell.environ.pop("GATEWAY_URL"), shell.environ.pop("GATEWAY_TOKEN")
    shell.environ["GATEWAY_PORT"] = str(urlsplit(url).port)
    assert "GATEWAY_TOKEN" in (await shell.run("tasks", code=2)).stderr
    (folder / ".gateway").mkdir()
    (folder / ".gateway" / "demo.token").write_text(f"{token}\n")
    await shell.run("tasks")
    assert "can_pay" in (await shell.run_json("quota"))["account"]
    await shell.run("tasks", "--url", url, code=2)  # the demo's token goes nowhere else


async def test_interrupted_on_a_terminal(shell: Shell) -> None:
    """The progress is drawn; what continues is named; the same command resumes it."""
    await shell.gateway.upstream.keep_running()
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "submit", "upscale", "photo.png", "--wait"),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, **shell.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    os.close(theirs)
    output = b""
    try:
        while b"queued" not in output and b"running" not in output:
            output += await asyncio.to_thread(os.read, ours, 1_000)
        process.send_signal(signal.SIGINT)
        await process.wait()
        while b"Interrupted" not in output:
            output += await asyncio.to_thread(os.read, ours, 1_000)
    finally:
        os.close(ours)
    assert (process.returncode, b"1 image" in output, b"task_" in output) == (130, True, True)
    await shell.run("submit", "upscale", "photo.png")
    assert await shell.gateway.upstream.count_submits() == 1


def test_completion() -> None:
    for name in ("bash", "zsh", "fish"):
        assert "_GATEWAY_COMPLETE" in run_command("completion", name).stdout
    command = [sys.executable, "-c", "from service.cli import main; main(prog_name='gateway')"]
    environ: dict[str, Any] = {**os.environ, "_GATEWAY_COMPLETE": "bash_complete", "COMP_CWORD": "3"}
    environ |= {"PYTHONPATH": str(Path(__file__).parents[2]), "COMP_WORDS": "gateway submit upscale --high"}
    completed = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert completed.stdout == "plain,--high-fidelity\n"


def test_commands_of_callers_import_nothing_of_the_server() -> None:
    heavy = {"cryptography", "litestar", "redis", "rich", "service.api", "service.settings", "uvicorn"}
    script = f"import sys; from service.cli import callers, download, submit; assert not {heavy} & set(sys.modules)"
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
