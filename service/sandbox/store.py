"""Accounts, tasks and files of the sandbox."""

from __future__ import annotations

import secrets
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from service.sandbox.faults import Kind
from service.sandbox.forms import Options


class AccountBalance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is left of an account.

    Attributes:
        count: prepaid uses.
        money: yuan.

    """

    count: Annotated[int, msgspec.Meta(ge=0)]
    money: Annotated[int, msgspec.Meta(ge=0)]

    def charge(self, price: int) -> AccountBalance | None:
        """Give what is left after a task: a prepaid use goes first, then money; None if neither suffices.

        Args:
            price: of the task, in yuan.

        """
        if self.count > 0:
            return AccountBalance(self.count - 1, self.money)
        if self.money >= price:
            return AccountBalance(0, self.money - price)
        return None


State: TypeAlias = Literal["open", "completed", "failed"]
MAX_TASKS: Final = 1_000
MAX_BYTES: Final = 2 * 1024**3
INPUT_NAME: Final = "input"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS account (user_key TEXT PRIMARY KEY, count INTEGER NOT NULL, money INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS task (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL, bytes INTEGER NOT NULL, record BLOB NOT NULL
);
"""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One task.

    Attributes:
        ready: when it may end at the earliest, in seconds since the epoch, which a restart does not reset.
        charged: whether it was paid for at its submit.
        doomed: the reason for which it is to fail; None if it is to be tried.
        reason: why it failed.
        files: names of the results.
        balance: of its account when it ended.

    """

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


def new_task_id() -> str:
    """Make a task id: decimal and below 2**53, so that it stays itself where the dials turn it into a number."""
    return str(secrets.choice(range(10**15, 9 * 10**15)))


class Store:
    """Keeps everything that outlives a restart. Not for several threads, except for `folder_of`."""

    def __init__(
        self,
        folder: Path,
        accounts: Mapping[str, AccountBalance],
        *,
        max_tasks: int = MAX_TASKS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Open the folder.

        Args:
            folder: made if it is missing.
            accounts: to be made, except for those that the folder knows already.
            most_tasks: ended tasks that are kept.
            most_bytes: that their results may take together.

        Raises:
            OSError: the folder can't be used.
            sqlite3.Error: likewise.

        """
        self._max_tasks = max_tasks
        self._max_bytes = max_bytes
        self._tasks_folder = folder / "tasks"
        self._tasks_folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / "sandbox.sqlite3")
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
        known = self.list_accounts()
        for user_key, balance in accounts.items():
            if user_key not in known:
                self.set_account(user_key, balance)
        self._remove_orphans()

    def close(self) -> None:
        """Let go of the folder."""
        self._db.close()

    def task_folder(self, task_id: str) -> Path:
        """Name the folder of a task's files."""
        return self._tasks_folder / task_id

    def list_accounts(self) -> dict[str, AccountBalance]:
        """Give all accounts."""
        rows = self._db.execute("SELECT user_key, count, money FROM account ORDER BY user_key")
        return {user_key: AccountBalance(count, money) for user_key, count, money in rows}

    def get_balance(self, user_key: str) -> AccountBalance | None:
        """Give what an account holds; None if there is no such account."""
        row = self._db.execute("SELECT count, money FROM account WHERE user_key = ?", (user_key,)).fetchone()
        return None if row is None else AccountBalance(*row)

    def set_account(self, user_key: str, balance: AccountBalance) -> None:
        """Make or replace an account."""
        with self._db:
            self._write_account(user_key, balance)

    def add_task(self, task: Task, balance: AccountBalance) -> None:
        """Write a new task and what its account holds from now on."""
        with self._db:
            self._db.execute(
                "INSERT INTO task (id, state, bytes, record) VALUES (?, ?, 0, ?)",
                (task.id, task.state, msgspec.json.encode(task)),
            )
            self._write_account(task.user_key, balance)

    def finish_task(self, task: Task, size: int) -> None:
        """Write the end of a task, and the balance it ended with to its account.

        Args:
            task: as it ended.
            size: of its results, in bytes.

        """
        with self._db:
            self._db.execute(
                "UPDATE task SET state = ?, bytes = ?, record = ? WHERE id = ?",
                (task.state, size, msgspec.json.encode(task), task.id),
            )
            if task.balance is not None:
                self._write_account(task.user_key, task.balance)

    def get_task(self, task_id: str) -> Task | None:
        """Give a task; None if there is none of this id, or it was pruned."""
        row = self._db.execute("SELECT record FROM task WHERE id = ?", (task_id,)).fetchone()
        return None if row is None else _decode_task(row[0])

    def list_open_tasks(self) -> list[Task]:
        """Give the tasks that have not ended, oldest first."""
        rows = self._db.execute("SELECT record FROM task WHERE state = 'open' ORDER BY number")
        return [_decode_task(record) for (record,) in rows]

    def prune_tasks(self) -> list[Path]:
        """Forget the oldest ended tasks beyond the bounds, but never the newest; give the folders to be removed."""
        rows = self._db.execute("SELECT id, bytes FROM task WHERE state != 'open' ORDER BY number DESC").fetchall()
        total, gone = 0, []
        for place, (task_id, size) in enumerate(rows):
            total += size
            if place > 0 and (place >= self._max_tasks or total > self._max_bytes):
                gone.append(task_id)
        with self._db:
            self._db.executemany("DELETE FROM task WHERE id = ?", [(task_id,) for task_id in gone])
        return [self.task_folder(task_id) for task_id in gone]

    def clear(self, accounts: Mapping[str, AccountBalance]) -> None:
        """Forget all tasks and their files, and set the accounts to these."""
        with self._db:
            self._db.execute("DELETE FROM task")
            self._db.execute("DELETE FROM account")
            for user_key, balance in accounts.items():
                self._write_account(user_key, balance)
        self._remove_orphans()

    def _write_account(self, user_key: str, balance: AccountBalance) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO account (user_key, count, money) VALUES (?, ?, ?)",
            (user_key, balance.count, balance.money),
        )

    def _remove_orphans(self) -> None:
        """Remove the files of submits that were cut off before their task was written."""
        known = {task_id for (task_id,) in self._db.execute("SELECT id FROM task")}
        for folder in self._tasks_folder.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)


def _decode_task(record: bytes) -> Task:
    return msgspec.json.decode(record, type=Task)
