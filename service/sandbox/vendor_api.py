"""The vendor's calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from http.client import responses
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from service.sandbox.faults import Fault, Journal, Kind, Panel, Received, Wrong
from service.sandbox.forms import FILE, Form, RejectedError, parse_options, read_form
from service.sandbox.http import JSON, ClientLeftError, Exchange
from service.sandbox.store import Balance, Store, Task, new_task_id
from service.sandbox.worker import Workshop

UNKNOWN_ACCOUNT: Final = "账户不存在"


NO_BALANCE: Final = "账户剩余次数不足"


UNKNOWN_TASK: Final = "任务未找到或状态未知"


_REJECTED: Final = "任务提交失败"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a submit or a check answers. A field that is unset is left out of the JSON."""

    err_code: int = 0
    err_msg: str | UnsetType = UNSET
    task_id: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    images_url: str | UnsetType = UNSET
    vector_url: str | UnsetType = UNSET
    grid_url: str | UnsetType = UNSET
    remaining_count: int | UnsetType = UNSET
    remaining_money: int | UnsetType = UNSET


def refusal(message: str) -> Answer:
    """Give the answer of a call that was refused."""
    return Answer(err_code=1, err_msg=message)


def rejected(reason: str, colon: str) -> str:
    """Give the message of a submit that was rejected for a reason."""
    return f"{_REJECTED}{colon}{reason}"


def spoiled(answer: Answer, wrong: dict[Any, Wrong]) -> dict[str, Any]:
    """Give the answer's JSON object with the named fields made wrong.

    Only a field that the answer has is spoiled, except that `null` also puts one where there was none: a state that
    is null stands in an answer without results.
    """
    content: dict[str, Any] = msgspec.to_builtins(answer)
    for name, way in wrong.items():
        if way == "null":
            content[name] = None
        elif name not in content:
            continue
        elif way == "missing":
            del content[name]
        else:
            content[name] = _mistyped(content[name], way)
    return content


def _mistyped(value: str | int, way: Wrong) -> str | int | float:
    if way == "string":
        return str(value)
    number = int(value) if isinstance(value, int) or value.isdecimal() else 7
    if way == "float":
        return number + 0.5
    return -1 - number if way == "negative" else number


_CHUNK: Final = 256 * 1024


_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


_CONTENT_TYPES: Final = {".png": "image/png", ".svg": "image/svg+xml"}


async def deliver(exchange: Exchange, answer: Answer, fault: Fault) -> None:
    """Send the answer of a call in the way the fault says."""
    if fault.reply in {"hang", "reset", "page"}:
        await withhold(exchange, fault)
        return
    body = msgspec.json.encode(spoiled(answer, fault.wrong))
    if fault.reply == "garbled":
        body = body[: len(body) // 2]
    await exchange.start(fault.status, JSON, len(body))
    if fault.reply == "cut":
        await exchange.write(body[: len(body) // 2], more=True)
        await _hang_up(exchange)
    else:
        await exchange.write(body)


async def withhold(exchange: Exchange, fault: Fault) -> None:
    """Do what the fault says instead of answering: hang, reset, or a page of HTML."""
    if fault.reply == "page":
        await exchange.respond(fault.status, "text/html; charset=utf-8", _page(fault.status))
        return
    if fault.reply == "reset":
        exchange.connection.reset()
    await exchange.gone()


async def deliver_file(exchange: Exchange, path: Path, fault: Fault) -> None:
    """Send a file, or the range of it that was asked for (RFC 9110, one range of bytes).

    Raises:
        OSError: the file can't be read.

    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        headers = {"accept_ranges": "bytes", "etag": f'"{path.parent.name}-{path.stem}"'}
        content_type = _CONTENT_TYPES[path.suffix]
        status, first, end = 200, 0, size
        asked = _RANGE.fullmatch(exchange.header("range"))
        if asked and exchange.method == "GET" and exchange.header("if-range") in {"", headers["etag"]}:
            first, end = _bounds(asked, size)
            if first >= end:
                await exchange.start(416, content_type, 0, content_range=f"bytes */{size}")
                await exchange.write(b"")
                return
            status = 206
            headers["content_range"] = f"bytes {first}-{end - 1}/{size}"
        await exchange.start(status, content_type, end - first, **headers)
        if exchange.method == "GET":
            file.seek(first)
            left = (end - first) // 2 if fault.reply == "cut" else end - first
            while left > 0 and (piece := file.read(min(_CHUNK, left))):
                left -= len(piece)
                await exchange.write(piece, more=True)
    if fault.reply == "cut":
        await _hang_up(exchange)
    else:
        await exchange.write(b"")


def _bounds(asked: re.Match[str], size: int) -> tuple[int, int]:
    """Give the first byte of a range and the one behind its last; they meet where no byte can be given."""
    first, last = asked.groups()
    if first:
        return int(first), min(int(last) + 1, size) if last else size
    return (max(size - int(last), 0), size) if last else (0, 0)


async def _hang_up(exchange: Exchange) -> None:
    exchange.connection.hang_up()
    await exchange.gone()


def _page(status: int) -> bytes:
    title = f"{status} {responses.get(status, 'Error')}"
    return (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n"
        f"<center><h1>{title}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
    ).encode()


FILES: Final = "/files/"


class RefusedError(Exception):
    """A call that is answered with an error; the text is the vendor's message."""


_Deed: TypeAlias = Callable[[Exchange, Form, Fault, Received], Awaitable[Answer]]


class Upstream:
    """The vendor's side of the sandbox."""

    def __init__(
        self,
        store: Store,
        workshop: Workshop,
        journal: Journal,
        closing: asyncio.Event,
        panel: Panel,
        seconds: float,
    ) -> None:
        """Bind the calls to what they work on.

        Args:
            store: accounts and tasks.
            workshop: works on the tasks.
            journal: is told of every request.
            closing: set when no request may wait any longer.
            panel: how to behave.
            seconds: that a task takes at least, where the dials don't say.

        """
        self._store = store
        self._workshop = workshop
        self._journal = journal
        self._closing = closing
        self._seconds = seconds
        self._panel = panel

    async def submit(self, kind: Kind, exchange: Exchange) -> None:
        """Answer one of the four submits."""
        await self._call(Received(operation="submit", path=exchange.path), exchange, partial(self._accept, kind))

    async def check(self, exchange: Exchange) -> None:
        """Answer a check of a task."""
        await self._call(Received(operation="check", path=exchange.path), exchange, self._tell)

    async def file(self, exchange: Exchange) -> None:
        """Hand out a result."""
        task_id, _, name = exchange.path.removeprefix(FILES).partition("/")
        task = self._store.task(task_id)
        if task is None or name not in task.files:
            await exchange.respond(404, "text/plain; charset=utf-8", b"no such file\n")
            return
        entry = Received(operation="file", path=exchange.path, user_key=task.user_key, task_id=task_id)
        fault = self._strike(entry)
        if not await self._begins(exchange, fault, entry):
            return
        self._journal.update(entry, "served")
        if fault.reply in {"json", "cut"}:
            await deliver_file(exchange, self._store.folder_of(task_id) / name, fault)
        else:
            await withhold(exchange, fault)

    async def _call(self, entry: Received, exchange: Exchange, deed: _Deed) -> None:
        try:
            form = await read_form(exchange.header("content-type"), exchange.body())
        except ClientLeftError:
            self._journal.add(entry)
            self._journal.update(entry, "broken_off")
            return
        entry.user_key = form.fields.pop("user_key", "")
        entry.fields = form.fields
        entry.image_bytes = len(form.image or b"")
        fault = self._strike(entry)
        if not await self._begins(exchange, fault, entry):
            return
        try:
            answer = await deed(exchange, form, fault, entry)
        except RefusedError as error:
            self._journal.update(entry, "refused", str(error))
            answer = refusal(str(error))
        await deliver(exchange, answer, fault)

    def _strike(self, entry: Received) -> Fault:
        fault = self._panel.strike(entry.operation, entry.user_key)
        entry.reply = fault.reply
        self._journal.add(entry)
        return fault

    async def _begins(self, exchange: Exchange, fault: Fault, entry: Received) -> bool:
        """Wait as the fault says, and say whether the request is to be carried out.

        It is even if its client has left meanwhile: a server that is slow does not notice.
        """
        if fault.latency > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), fault.latency)
                await exchange.gone()
                return False
        if fault.when == "before":
            self._journal.update(entry, "not_reached")
            await withhold(exchange, fault)
            return False
        return True

    async def _accept(self, kind: Kind, _: Exchange, form: Form, fault: Fault, entry: Received) -> Answer:
        self._account(entry.user_key, fault)
        task_id = new_task_id()
        try:
            if fault.reject is not None:
                raise RejectedError(fault.reject)
            if form.fault is not None:
                raise RejectedError(form.fault)
            options = parse_options(kind, form.fields)
            if form.image is None:
                raise RejectedError(f"缺少参数{FILE}")
            await self._workshop.take_in(task_id, form.image)
        except RejectedError as error:
            raise RefusedError(rejected(str(error), self._panel.dials.colon)) from None
        # From here to the transaction nothing is awaited: no other submit can spend the same balance.
        balance = self._account(entry.user_key, fault)
        paid = balance.pay(self._panel.dials.price(kind))
        if paid is None:
            await self._workshop.throw_away(task_id)
            raise RefusedError(NO_BALANCE)
        charged = self._panel.dials.charge == "submit"
        seconds = self._seconds if self._panel.dials.seconds is None else self._panel.dials.seconds
        task = Task(
            id=task_id,
            user_key=entry.user_key,
            kind=kind,
            options=options,
            ready=time.time() + seconds,
            charged=charged,
            doomed=fault.fail,
        )
        left = paid if charged else balance
        self._store.accept(task, left)
        self._workshop.start(task)
        entry.task_id = task_id
        self._journal.update(entry, "accepted")
        return Answer(task_id=task_id, remaining_count=left.count, remaining_money=left.money)

    async def _tell(self, exchange: Exchange, form: Form, fault: Fault, entry: Received) -> Answer:
        balance = self._account(entry.user_key, fault)
        entry.task_id = form.fields.get("task_id", "")
        task = self._store.task(entry.task_id)
        if task is None or task.user_key != entry.user_key:
            raise RefusedError(UNKNOWN_TASK)
        detail, word = task.reason or "", str(task.state)
        if task.state == "open":
            word = "processing" if self._workshop.started(task.id) else "pending"
        status = self._panel.dials.spell(word)
        self._journal.update(entry, "told", f"{status}: {detail}" if detail else status)
        if task.state != "completed":
            return Answer(status=status)
        if self._panel.dials.checked_balance == "then" and task.balance is not None:
            balance = task.balance
        found = {name: f"{exchange.base_url}{FILES}{task.id}/{name}" for name in task.files}
        return Answer(
            status=status,
            images_url=found.get("image.png", UNSET),
            vector_url=found.get("vector.svg", UNSET),
            grid_url=found.get("grid.png", UNSET),
            remaining_count=balance.count,
            remaining_money=balance.money,
        )

    def _account(self, user_key: str, fault: Fault) -> Balance:
        balance = self._store.balance(user_key)
        if balance is None:
            raise RefusedError(UNKNOWN_ACCOUNT)
        if fault.refuse is not None:
            raise RefusedError(fault.refuse)
        return balance
