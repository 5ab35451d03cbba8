"""Persistence across restarts, and bounded storage."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import service.sandbox.store
from service.sandbox.app import RunningSandbox, SandboxConfig, open_sandbox
from service.sandbox.faults import Behaviour
from service.sandbox.forms import Options
from service.sandbox.store import AccountBalance, State, Store, Task
from tests.sandbox.client import SandboxClient, open_client


@asynccontextmanager
async def run_sandbox(folder: Path, seconds: float = 0) -> AsyncIterator[tuple[RunningSandbox, SandboxClient]]:
    config = SandboxConfig(folder=folder, accounts={"key": AccountBalance(3, 10)}, seconds=seconds)
    async with open_sandbox(config) as sandbox, open_client(sandbox.url) as client:
        yield sandbox, client


def make_task(number: int, state: State = "open") -> Task:
    return Task(
        id=str(number), user_key="key", kind="face", options=Options(), ready_at=0, is_charged=True, state=state
    )


async def test_finished_task_outlives_a_restart(tmp_path: Path) -> None:
    """A finished task, its results and the balance survive a restart."""
    async with run_sandbox(tmp_path) as (sandbox, client):
        task_id = await client.submit_accepted()
        await sandbox.control.wait_until_idle()
        content = (await client.http.get((await client.check(task_id))["grid_url"])).content
    async with run_sandbox(tmp_path) as (_, client):
        answer = await client.check(task_id)
        assert (answer["status"], answer["remaining_count"]) == ("Completed", 2)
        assert (await client.http.get(answer["grid_url"])).content == content


async def test_unfinished_task_is_resumed(tmp_path: Path) -> None:
    """A task interrupted by a restart ends after it, and is charged once."""
    async with run_sandbox(tmp_path) as (sandbox, client):
        await sandbox.control.set_behaviour(Behaviour(seconds=0.3))
        task_id = await client.submit_accepted()
    async with run_sandbox(tmp_path) as (sandbox, client):
        await sandbox.control.wait_until_idle()
        answer = await client.check(task_id)
        assert (answer["status"], answer["remaining_count"]) == ("Completed", 2)


async def test_task_without_its_input_fails(tmp_path: Path) -> None:
    async with run_sandbox(tmp_path, seconds=0.1) as (_, client):
        task_id = await client.submit_accepted()
    (tmp_path / "tasks" / task_id / "input").unlink()
    async with run_sandbox(tmp_path) as (sandbox, client):
        await sandbox.control.wait_until_idle()
        assert (await client.check(task_id))["status"] == "Failed"


async def test_input_is_deleted_when_the_task_ends(tmp_path: Path) -> None:
    """An ended task keeps only its results, and a refused submit nothing."""
    async with run_sandbox(tmp_path) as (sandbox, client):
        task_id = await client.submit_accepted()
        await sandbox.control.set_account("key", AccountBalance(0, 0))
        assert (await client.submit()).json()["err_msg"] == "账户剩余次数不足"
        await sandbox.control.wait_until_idle()
        files = {
            str(path.relative_to(tmp_path / "tasks")) for path in (tmp_path / "tasks").rglob("*") if path.is_file()
        }
        assert files == {f"{task_id}/image.png", f"{task_id}/grid.png"}


async def test_killed_process_loses_no_accepted_task(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from service.sandbox.app import SandboxConfig, serve\n"
        "from service.sandbox.store import AccountBalance\n"
        "config = SandboxConfig(folder=pathlib.Path(sys.argv[1]), accounts={'key': AccountBalance(3, 10)}, seconds=0)\n"
        "asyncio.run(serve(config, '127.0.0.1', 0, on_ready=lambda url: print(url, flush=True)))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    async with open_client(url) as client:
        task_id = await client.submit_accepted("submit_vector_task")
        process.kill()
        await process.wait()
    async with run_sandbox(tmp_path) as (sandbox, client):
        await sandbox.control.wait_until_idle()
        answer = await client.check(task_id)
        assert (answer["status"], answer["remaining_count"]) == ("Completed", 2)


async def test_temporary_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with (
        open_sandbox(SandboxConfig(accounts={"key": AccountBalance(1, 0)}, seconds=0)) as sandbox,
        open_client(sandbox.url) as client,
    ):
        await client.submit_accepted()
        await sandbox.control.wait_until_idle()
        assert list(tmp_path.rglob("image.png"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("most_tasks", "most_bytes", "kept"), [(2, 1000, {3, 4}), (9, 25, {3, 4}), (9, 5, {4})])
def test_oldest_ended_tasks_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_tasks: int, most_bytes: int, kept: set[int]
) -> None:
    """Beyond a number of tasks or bytes the oldest ended ones are deleted; running ones stay."""
    monkeypatch.setattr(service.sandbox.store, "MAX_TASKS", most_tasks)
    monkeypatch.setattr(service.sandbox.store, "MAX_BYTES", most_bytes)
    store = Store(tmp_path, {})
    for number in range(5):
        store.add_task(make_task(number), AccountBalance(0, 0))
        if number > 0:
            store.finish_task(make_task(number, "completed"), 10)
    folders = store.prune_tasks()
    assert {number for number in range(5) if store.get_task(str(number))} == kept | {0}
    assert folders == [store.task_folder(str(number)) for number in (3, 2, 1) if number not in kept]
    store.close()


async def test_files_of_deleted_tasks_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.sandbox.store, "MAX_TASKS", 1)
    async with run_sandbox(tmp_path) as (sandbox, client):
        task_ids = []
        for _ in range(3):
            task_ids.append(await client.submit_accepted())
            await sandbox.control.wait_until_idle()
        assert [(await client.check(task_id))["err_code"] for task_id in task_ids] == [1, 1, 0]
    assert [folder.name for folder in (tmp_path / "tasks").iterdir()] == task_ids[-1:]


def test_orphaned_files_are_deleted(tmp_path: Path) -> None:
    """Files of a submit that never became a task are deleted at the next start."""
    orphan, kept = tmp_path / "tasks" / "9", tmp_path / "tasks" / "1"
    store = Store(tmp_path, {})
    store.add_task(make_task(1), AccountBalance(0, 0))
    store.close()
    for folder in (orphan, kept):
        folder.mkdir()
    Store(tmp_path, {}).close()
    assert kept.exists()
    assert not orphan.exists()
