"""The sandbox as a server: its end, restarts and bounded storage."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import service.sandbox.store
from service.sandbox.app import RunningSandbox, SandboxConfig, open_sandbox
from service.sandbox.faults import Behaviour, Fault
from service.sandbox.store import AccountBalance
from tests.sandbox.conftest import SandboxClient, open_client

CONFIG = SandboxConfig(accounts={"key": AccountBalance(3, 10)}, seconds=0)


@asynccontextmanager
async def run_sandbox(folder: Path, seconds: float = 0) -> AsyncIterator[tuple[RunningSandbox, SandboxClient]]:
    config = SandboxConfig(folder=folder, accounts=CONFIG.accounts, seconds=seconds)
    async with open_sandbox(config) as sandbox, open_client(sandbox.url) as client:
        yield sandbox, client


async def test_closing_cuts_hanging_and_delayed_requests() -> None:
    threads = threading.active_count()
    faults = (Fault(times=1, reply="hang"), Fault(times=1, latency=3600), Fault(times=1))
    async with asyncio.timeout(120):
        async with open_sandbox(CONFIG) as sandbox, open_client(sandbox.url) as client:
            await sandbox.control.set_behaviour(Behaviour(seconds=3600, faults=faults))
            submits = [asyncio.ensure_future(client.submit()) for _ in faults]
            await asyncio.wait(submits, return_when=asyncio.FIRST_COMPLETED)
            await sandbox.control.wait_for_requests(lambda entries: len(entries) == len(faults))
        outcomes = await asyncio.gather(*submits, return_exceptions=True)
    assert sum(isinstance(outcome, BaseException) for outcome in outcomes) == 2
    assert threading.active_count() == threads


async def test_restart_keeps_results_and_balances(tmp_path: Path) -> None:
    async with run_sandbox(tmp_path) as (sandbox, client):
        finished = await client.submit_accepted()
        await sandbox.control.wait_until_idle()
        content = (await client.http.get((await client.check(finished))["grid_url"])).content
        await sandbox.control.set_behaviour(Behaviour(seconds=0.3))
        unfinished, lost = [await client.submit_accepted() for _ in range(2)]
    (tmp_path / "tasks" / lost / "input").unlink()
    async with run_sandbox(tmp_path) as (sandbox, client):
        answer = await client.check(finished)
        assert (answer["status"], answer["remaining_count"]) == ("Completed", 0)
        assert (await client.http.get(answer["grid_url"])).content == content
        await sandbox.control.wait_until_idle()
        assert [(await client.check(task_id))["status"] for task_id in (unfinished, lost)] == ["Completed", "Failed"]
        assert await sandbox.control.list_accounts() == {"key": AccountBalance(0, 10)}


async def test_only_results_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with open_sandbox(CONFIG) as sandbox, open_client(sandbox.url) as client:
        task_id = await client.submit_accepted()
        await sandbox.control.set_account("key", AccountBalance(0, 0))
        assert (await client.submit()).json()["err_code"] == 1
        await sandbox.control.wait_until_idle()
        (tasks,) = tmp_path.rglob("tasks")
        files = {str(path.relative_to(tasks)) for path in tasks.rglob("*") if path.is_file()}
        assert files == {f"{task_id}/image.png", f"{task_id}/grid.png"}
    assert list(tmp_path.iterdir()) == []


async def test_oldest_ended_tasks_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks" / "9").mkdir(parents=True)  # of a submit that never became a task
    async with run_sandbox(tmp_path) as (sandbox, client):
        await sandbox.control.set_account("key", AccountBalance(9, 0))
        await sandbox.control.set_behaviour(Behaviour(seconds=3600))
        task_ids = [await client.submit_accepted()]
        await sandbox.control.set_behaviour(Behaviour(seconds=0))
        for name, limit, kept in (("MAX_TASKS", 9, [0, 1]), ("MAX_TASKS", 1, [0, 2]), ("MAX_BYTES", 1, [0, 3])):
            monkeypatch.setattr(service.sandbox.store, name, limit)
            task_ids.append(await client.submit_accepted())
            async with asyncio.timeout(120):
                while (await client.check(task_ids[-1]))["status"] != "Completed":
                    pass
            codes = [(await client.check(task_id))["err_code"] for task_id in task_ids]
            assert [number for number, code in enumerate(codes) if code == 0] == kept
            monkeypatch.setattr(service.sandbox.store, "MAX_TASKS", 9)
    assert {folder.name for folder in (tmp_path / "tasks").iterdir()} == {task_ids[0], task_ids[3]}
