"""Accounts, tasks and files of the sandbox."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from service.sandbox.faults import Kind
from service.sandbox.forms import Options


class AccountBalance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prepaid uses and yuan of an account."""

    count: Annotated[int, msgspec.Meta(ge=0)]
    money: Annotated[int, msgspec.Meta(ge=0)]

    def charge(self, price: int) -> AccountBalance | None:
        """Return the balance after a task, which takes a prepaid use or else its price; None if neither suffices."""
        if self.count > 0:
            return AccountBalance(self.count - 1, self.money)
        if self.money >= price:
            return AccountBalance(0, self.money - price)
        return None


State: TypeAlias = Literal["open", "completed", "failed"]
MAX_TASKS: Final = 1_000
"""Limit of the finished tasks; `MAX_BYTES` limits their results."""
MAX_BYTES: Final = 2 * 1024**3
INPUT_NAME: Final = "input"
# The field names in existing databases.
_STORED_NAMES: Final = {"ready_at": "ready", "is_charged": "charged", "planned_failure": "doomed"}
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS account (user_key TEXT PRIMARY KEY, count INTEGER NOT NULL, money INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS task (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL, bytes INTEGER NOT NULL, record BLOB NOT NULL
);
"""


class Task(msgspec.Struct, frozen=True, kw_only=True, rename=_STORED_NAMES):
    """One task. `ready_at` is its earliest end, `reason` that of its failure, `balance` its account's at its end."""

    id: str
    user_key: str
    kind: Kind
    options: Options
    ready_at: float
    is_charged: bool
    planned_failure: str | None = None
    state: State = "open"
    reason: str | None = None
    files: tuple[str, ...] = ()
    balance: AccountBalance | None = None


class Store:
    """Persistent state in one folder: SQLite and a folder for each task. Thread-safe: `task_folder` alone."""

    def __init__(self, folder: Path, accounts: Mapping[str, AccountBalance]) -> None:
        """Open the folder and create its missing accounts. Raises OSError and sqlite3.Error."""
        self._tasks_folder = folder / "tasks"
        self._tasks_folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / "sandbox.sqlite3")
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
        with self._db:
            self._add_missing_accounts(accounts)
        self._remove_orphans()

    def close(self) -> None:
        self._db.close()

    def task_folder(self, task_id: str) -> Path:
        return self._tasks_folder / task_id

    def list_accounts(self) -> dict[str, AccountBalance]:
        rows = self._db.execute("SELECT user_key, count, money FROM account ORDER BY user_key")
        return {user_key: AccountBalance(count, money) for user_key, count, money in rows}

    def get_balance(self, user_key: str) -> AccountBalance | None:
        row = self._db.execute("SELECT count, money FROM account WHERE user_key = ?", (user_key,)).fetchone()
        return None if row is None else AccountBalance(*row)

    def set_account(self, user_key: str, balance: AccountBalance) -> None:
        with self._db:
            self._write_account(user_key, balance)

    def add_task(self, task: Task, balance: AccountBalance) -> None:
        """Write a new task and the balance of its account in one transaction."""
        with self._db:
            self._db.execute(
                "INSERT INTO task (id, state, bytes, record) VALUES (?, ?, 0, ?)",
                (task.id, task.state, msgspec.json.encode(task)),
            )
            self._write_account(task.user_key, balance)

    def finish_task(self, task: Task, size: int) -> None:
        """Write a finished task, the size of its results in bytes, and the balance of its account."""
        with self._db:
            self._db.execute(
                "UPDATE task SET state = ?, bytes = ?, record = ? WHERE id = ?",
                (task.state, size, msgspec.json.encode(task), task.id),
            )
            if task.balance is not None:
                self._write_account(task.user_key, task.balance)

    def get_task(self, task_id: str) -> Task | None:
        row = self._db.execute("SELECT record FROM task WHERE id = ?", (task_id,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Task)

    def list_open_tasks(self) -> list[Task]:
        """Return the unfinished tasks, oldest first."""
        rows = self._db.execute("SELECT record FROM task WHERE state = 'open' ORDER BY number")
        return [msgspec.json.decode(record, type=Task) for (record,) in rows]

    def prune_tasks(self) -> list[Path]:
        """Delete the oldest finished tasks beyond the limits, never the newest. Return the folders to remove."""
        rows = self._db.execute("SELECT id, bytes FROM task WHERE state != 'open' ORDER BY number DESC").fetchall()
        total_bytes, pruned = 0, []
        for index, (task_id, size) in enumerate(rows):
            total_bytes += size
            if index > 0 and (index >= MAX_TASKS or total_bytes > MAX_BYTES):
                pruned.append(task_id)
        with self._db:
            self._db.executemany("DELETE FROM task WHERE id = ?", [(task_id,) for task_id in pruned])
        return [self.task_folder(task_id) for task_id in pruned]

    def clear(self, accounts: Mapping[str, AccountBalance]) -> None:
        """Delete all tasks with their files, and replace the accounts."""
        with self._db:
            self._db.execute("DELETE FROM task")
            self._db.execute("DELETE FROM account")
            self._add_missing_accounts(accounts)
        self._remove_orphans()

    def _add_missing_accounts(self, accounts: Mapping[str, AccountBalance]) -> None:
        rows = [(user_key, balance.count, balance.money) for user_key, balance in accounts.items()]
        self._db.executemany("INSERT OR IGNORE INTO account (user_key, count, money) VALUES (?, ?, ?)", rows)

    def _write_account(self, user_key: str, balance: AccountBalance) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO account (user_key, count, money) VALUES (?, ?, ?)",
            (user_key, balance.count, balance.money),
        )

    def _remove_orphans(self) -> None:
        """Remove the files of submits that were interrupted before their task was written."""
        task_ids = {task_id for (task_id,) in self._db.execute("SELECT id FROM task")}
        for folder in self._tasks_folder.iterdir():
            if folder.name not in task_ids:
                shutil.rmtree(folder, ignore_errors=True)
