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

from service.sandbox.faults import Fault, FaultInjector, FieldDefect, Kind, RequestLog, RequestRecord
from service.sandbox.forms import FILE_FIELD, Form, RejectedError, parse_options, read_form
from service.sandbox.http import JSON_TYPE, ClientDisconnectedError, Exchange
from service.sandbox.store import AccountBalance, Store, Task, new_task_id
from service.sandbox.worker import Worker

UNKNOWN_ACCOUNT: Final = "账户不存在"
NO_BALANCE: Final = "账户剩余次数不足"
UNKNOWN_TASK: Final = "任务未找到或状态未知"
_REJECTION_PREFIX: Final = "任务提交失败"


class VendorResponse(msgspec.Struct, frozen=True, kw_only=True):
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


def refusal_response(message: str) -> VendorResponse:
    """Give the answer of a call that was refused."""
    return VendorResponse(err_code=1, err_msg=message)


def rejection_message(reason: str, colon: str) -> str:
    """Give the message of a submit that was rejected for a reason."""
    return f"{_REJECTION_PREFIX}{colon}{reason}"


def corrupt_fields(answer: VendorResponse, wrong: dict[Any, FieldDefect]) -> dict[str, Any]:
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
            content[name] = _corrupt_value(content[name], way)
    return content


def _corrupt_value(value: str | int, way: FieldDefect) -> str | int | float:
    if way == "string":
        return str(value)
    number = int(value) if isinstance(value, int) or value.isdecimal() else 7
    if way == "float":
        return number + 0.5
    return -1 - number if way == "negative" else number


_CHUNK_BYTES: Final = 256 * 1024
_RANGE_PATTERN: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_CONTENT_TYPES: Final = {".png": "image/png", ".svg": "image/svg+xml"}


async def send_response(exchange: Exchange, answer: VendorResponse, fault: Fault) -> None:
    """Send the answer of a call in the way the fault says."""
    if fault.reply in {"hang", "reset", "page"}:
        await break_response(exchange, fault)
        return
    body = msgspec.json.encode(corrupt_fields(answer, fault.wrong))
    if fault.reply == "garbled":
        body = body[: len(body) // 2]
    await exchange.send_head(fault.status, JSON_TYPE, len(body))
    if fault.reply == "cut":
        await exchange.send_body(body[: len(body) // 2], more=True)
        await _close_connection(exchange)
    else:
        await exchange.send_body(body)


async def break_response(exchange: Exchange, fault: Fault) -> None:
    """Do what the fault says instead of answering: hang, reset, or a page of HTML."""
    if fault.reply == "page":
        await exchange.respond(fault.status, "text/html; charset=utf-8", _error_page(fault.status))
        return
    if fault.reply == "reset":
        exchange.connection.reset()
    await exchange.wait_closed()


async def send_file(exchange: Exchange, path: Path, fault: Fault) -> None:
    """Send a file, or the range of it that was asked for (RFC 9110, one range of bytes).

    Raises:
        OSError: the file can't be read.

    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        headers = {"accept_ranges": "bytes", "etag": f'"{path.parent.name}-{path.stem}"'}
        content_type = _CONTENT_TYPES[path.suffix]
        status, first, end = 200, 0, size
        asked = _RANGE_PATTERN.fullmatch(exchange.header("range"))
        if asked and exchange.method == "GET" and exchange.header("if-range") in {"", headers["etag"]}:
            first, end = _resolve_range(asked, size)
            if first >= end:
                await exchange.send_head(416, content_type, 0, content_range=f"bytes */{size}")
                await exchange.send_body(b"")
                return
            status = 206
            headers["content_range"] = f"bytes {first}-{end - 1}/{size}"
        await exchange.send_head(status, content_type, end - first, **headers)
        if exchange.method == "GET":
            file.seek(first)
            left = (end - first) // 2 if fault.reply == "cut" else end - first
            while left > 0 and (piece := file.read(min(_CHUNK_BYTES, left))):
                left -= len(piece)
                await exchange.send_body(piece, more=True)
    if fault.reply == "cut":
        await _close_connection(exchange)
    else:
        await exchange.send_body(b"")


def _resolve_range(asked: re.Match[str], size: int) -> tuple[int, int]:
    """Give the first byte of a range and the one behind its last; they meet where no byte can be given."""
    first, last = asked.groups()
    if first:
        return int(first), min(int(last) + 1, size) if last else size
    return (max(size - int(last), 0), size) if last else (0, 0)


async def _close_connection(exchange: Exchange) -> None:
    exchange.connection.close_gracefully()
    await exchange.wait_closed()


def _error_page(status: int) -> bytes:
    title = f"{status} {responses.get(status, 'Error')}"
    return (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n"
        f"<center><h1>{title}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
    ).encode()


FILES_PATH: Final = "/files/"


class CallRefusedError(Exception):
    """A call that is answered with an error; the text is the vendor's message."""


_CallHandler: TypeAlias = Callable[[Exchange, Form, Fault, RequestRecord], Awaitable[VendorResponse]]


class VendorApi:
    """The vendor's side of the sandbox."""

    def __init__(
        self,
        store: Store,
        workshop: Worker,
        journal: RequestLog,
        closing: asyncio.Event,
        panel: FaultInjector,
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
        self._worker = workshop
        self._request_log = journal
        self._shutdown_event = closing
        self._seconds = seconds
        self._fault_injector = panel

    async def submit(self, kind: Kind, exchange: Exchange) -> None:
        """Answer one of the four submits."""
        await self._handle_call(
            RequestRecord(operation="submit", path=exchange.path), exchange, partial(self._accept_submit, kind)
        )

    async def check(self, exchange: Exchange) -> None:
        """Answer a check of a task."""
        await self._handle_call(RequestRecord(operation="check", path=exchange.path), exchange, self._report_status)

    async def serve_file(self, exchange: Exchange) -> None:
        """Hand out a result."""
        task_id, _, name = exchange.path.removeprefix(FILES_PATH).partition("/")
        task = self._store.get_task(task_id)
        if task is None or name not in task.files:
            await exchange.respond(404, "text/plain; charset=utf-8", b"no such file\n")
            return
        entry = RequestRecord(operation="file", path=exchange.path, user_key=task.user_key, task_id=task_id)
        fault = self._next_fault(entry)
        if not await self._apply_early_fault(exchange, fault, entry):
            return
        self._request_log.record_outcome(entry, "served")
        if fault.reply in {"json", "cut"}:
            await send_file(exchange, self._store.task_folder(task_id) / name, fault)
        else:
            await break_response(exchange, fault)

    async def _handle_call(self, entry: RequestRecord, exchange: Exchange, deed: _CallHandler) -> None:
        try:
            form = await read_form(exchange.header("content-type"), exchange.body())
        except ClientDisconnectedError:
            self._request_log.add(entry)
            self._request_log.record_outcome(entry, "broken_off")
            return
        entry.user_key = form.fields.pop("user_key", "")
        entry.fields = form.fields
        entry.image_bytes = len(form.image or b"")
        fault = self._next_fault(entry)
        if not await self._apply_early_fault(exchange, fault, entry):
            return
        try:
            answer = await deed(exchange, form, fault, entry)
        except CallRefusedError as error:
            self._request_log.record_outcome(entry, "refused", str(error))
            answer = refusal_response(str(error))
        await send_response(exchange, answer, fault)

    def _next_fault(self, entry: RequestRecord) -> Fault:
        fault = self._fault_injector.next_fault(entry.operation, entry.user_key)
        entry.reply = fault.reply
        self._request_log.add(entry)
        return fault

    async def _apply_early_fault(self, exchange: Exchange, fault: Fault, entry: RequestRecord) -> bool:
        """Wait as the fault says, and say whether the request is to be carried out.

        It is even if its client has left meanwhile: a server that is slow does not notice.
        """
        if fault.latency > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._shutdown_event.wait(), fault.latency)
                await exchange.wait_closed()
                return False
        if fault.when == "before":
            self._request_log.record_outcome(entry, "not_reached")
            await break_response(exchange, fault)
            return False
        return True

    async def _accept_submit(
        self, kind: Kind, _: Exchange, form: Form, fault: Fault, entry: RequestRecord
    ) -> VendorResponse:
        self._require_account(entry.user_key, fault)
        task_id = new_task_id()
        try:
            if fault.reject is not None:
                raise RejectedError(fault.reject)
            if form.error is not None:
                raise RejectedError(form.error)
            options = parse_options(kind, form.fields)
            if form.image is None:
                raise RejectedError(f"缺少参数{FILE_FIELD}")
            await self._worker.store_image(task_id, form.image)
        except RejectedError as error:
            raise CallRefusedError(rejection_message(str(error), self._fault_injector.behaviour.colon)) from None
        # From here to the transaction nothing is awaited: no other submit can spend the same balance.
        balance = self._require_account(entry.user_key, fault)
        paid = balance.charge(self._fault_injector.behaviour.price_of(kind))
        if paid is None:
            await self._worker.discard_files(task_id)
            raise CallRefusedError(NO_BALANCE)
        charged = self._fault_injector.behaviour.charge == "submit"
        seconds = (
            self._seconds if self._fault_injector.behaviour.seconds is None else self._fault_injector.behaviour.seconds
        )
        task = Task(
            id=task_id,
            user_key=entry.user_key,
            kind=kind,
            options=options,
            ready_at=time.time() + seconds,
            is_charged=charged,
            planned_failure=fault.fail,
        )
        left = paid if charged else balance
        self._store.add_task(task, left)
        self._worker.start(task)
        entry.task_id = task_id
        self._request_log.record_outcome(entry, "accepted")
        return VendorResponse(task_id=task_id, remaining_count=left.count, remaining_money=left.money)

    async def _report_status(
        self, exchange: Exchange, form: Form, fault: Fault, entry: RequestRecord
    ) -> VendorResponse:
        balance = self._require_account(entry.user_key, fault)
        entry.task_id = form.fields.get("task_id", "")
        task = self._store.get_task(entry.task_id)
        if task is None or task.user_key != entry.user_key:
            raise CallRefusedError(UNKNOWN_TASK)
        detail, word = task.reason or "", str(task.state)
        if task.state == "open":
            word = "processing" if self._worker.is_running(task.id) else "pending"
        status = self._fault_injector.behaviour.format_state(word)
        self._request_log.record_outcome(entry, "told", f"{status}: {detail}" if detail else status)
        if task.state != "completed":
            return VendorResponse(status=status)
        if self._fault_injector.behaviour.checked_balance == "then" and task.balance is not None:
            balance = task.balance
        found = {name: f"{exchange.base_url}{FILES_PATH}{task.id}/{name}" for name in task.files}
        return VendorResponse(
            status=status,
            images_url=found.get("image.png", UNSET),
            vector_url=found.get("vector.svg", UNSET),
            grid_url=found.get("grid.png", UNSET),
            remaining_count=balance.count,
            remaining_money=balance.money,
        )

    def _require_account(self, user_key: str, fault: Fault) -> AccountBalance:
        balance = self._store.get_balance(user_key)
        if balance is None:
            raise CallRefusedError(UNKNOWN_ACCOUNT)
        if fault.refuse is not None:
            raise CallRefusedError(fault.refuse)
        return balance
