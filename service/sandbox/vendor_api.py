"""The vendor's API: calls, response formats and files."""

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
    """Response of a submit or a check; unset fields are omitted from the JSON."""

    err_code: int = 0
    err_msg: str | UnsetType = UNSET
    task_id: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    images_url: str | UnsetType = UNSET
    vector_url: str | UnsetType = UNSET
    grid_url: str | UnsetType = UNSET
    remaining_count: int | UnsetType = UNSET
    remaining_money: int | UnsetType = UNSET


def corrupt_fields(response: VendorResponse, defects: dict[Any, FieldDefect]) -> dict[str, Any]:
    """Return the JSON object of a response with defects in its fields. `null` also adds an absent field."""
    content: dict[str, Any] = msgspec.to_builtins(response)
    for name, defect in defects.items():
        if defect == "null":
            content[name] = None
        elif name not in content:
            continue
        elif defect == "missing":
            del content[name]
        else:
            content[name] = _corrupt_value(content[name], defect)
    return content


def _corrupt_value(value: str | int, defect: FieldDefect) -> str | int | float:
    if defect == "string":
        return str(value)
    number = int(value) if isinstance(value, int) or value.isdecimal() else 7
    if defect == "float":
        return number + 0.5
    return -1 - number if defect == "negative" else number


FILES_PATH: Final = "/files/"
_CHUNK_BYTES: Final = 256 * 1024
_RANGE_PATTERN: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_CONTENT_TYPES: Final = {".png": "image/png", ".svg": "image/svg+xml"}


async def send_response(exchange: Exchange, response: VendorResponse, fault: Fault) -> None:
    """Send the response of a call with the defects of a fault."""
    if fault.reply in {"hang", "reset", "page"}:
        await break_response(exchange, fault)
        return
    body = msgspec.json.encode(corrupt_fields(response, fault.wrong))
    if fault.reply == "garbled":
        body = body[: len(body) // 2]
    await exchange.send_head(fault.status, JSON_TYPE, len(body))
    if fault.reply == "cut":
        await exchange.send_body(body[: len(body) // 2], more=True)
        await _close_connection(exchange)
    else:
        await exchange.send_body(body)


async def break_response(exchange: Exchange, fault: Fault) -> None:
    """Hang, reset the connection, or send a page of HTML."""
    if fault.reply == "page":
        await exchange.respond(fault.status, "text/html; charset=utf-8", _error_page(fault.status))
        return
    if fault.reply == "reset":
        exchange.reset_connection()
    await exchange.wait_closed()


async def send_file(exchange: Exchange, path: Path, fault: Fault) -> None:
    """Send a file, or one requested range of bytes (RFC 9110). Raises OSError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        headers = {"accept_ranges": "bytes", "etag": f'"{path.parent.name}-{path.stem}"'}
        content_type = _CONTENT_TYPES[path.suffix]
        status, first, end = 200, 0, size
        match = _RANGE_PATTERN.fullmatch(exchange.header("range"))
        if match and exchange.method == "GET" and exchange.header("if-range") in {"", headers["etag"]}:
            first, end = _resolve_range(match, size)
            if first >= end:
                await exchange.send_head(416, content_type, 0, content_range=f"bytes */{size}")
                await exchange.send_body(b"")
                return
            status = 206
            headers["content_range"] = f"bytes {first}-{end - 1}/{size}"
        await exchange.send_head(status, content_type, end - first, **headers)
        if exchange.method == "GET":
            file.seek(first)
            remaining = (end - first) // 2 if fault.reply == "cut" else end - first
            while remaining > 0 and (chunk := file.read(min(_CHUNK_BYTES, remaining))):
                remaining -= len(chunk)
                await exchange.send_body(chunk, more=True)
    if fault.reply == "cut":
        await _close_connection(exchange)
    else:
        await exchange.send_body(b"")


def _resolve_range(match: re.Match[str], size: int) -> tuple[int, int]:
    """Return the range as a half-open interval, empty if it can't be satisfied."""
    first, last = match.groups()
    if first:
        return int(first), min(int(last) + 1, size) if last else size
    return (max(size - int(last), 0), size) if last else (0, 0)


async def _close_connection(exchange: Exchange) -> None:
    exchange.close_connection()
    await exchange.wait_closed()


def _error_page(status: int) -> bytes:
    title = f"{status} {responses.get(status, 'Error')}"
    return (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n"
        f"<center><h1>{title}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
    ).encode()


class CallRefusedError(Exception):
    """A call gets an error response; the text is the vendor's message."""


_CallHandler: TypeAlias = Callable[[Exchange, Form, Fault, RequestRecord], Awaitable[VendorResponse]]


class VendorApi:
    """The vendor's calls."""

    def __init__(
        self,
        store: Store,
        worker: Worker,
        request_log: RequestLog,
        shutdown_event: asyncio.Event,
        fault_injector: FaultInjector,
        seconds: float,
    ) -> None:
        """`seconds` is the minimum duration of a task; delays end with `shutdown_event`."""
        self._store = store
        self._worker = worker
        self._request_log = request_log
        self._shutdown_event = shutdown_event
        self._seconds = seconds
        self._fault_injector = fault_injector

    async def submit(self, kind: Kind, exchange: Exchange) -> None:
        await self._handle_call(
            RequestRecord(operation="submit", path=exchange.path), exchange, partial(self._accept_submit, kind)
        )

    async def check(self, exchange: Exchange) -> None:
        await self._handle_call(RequestRecord(operation="check", path=exchange.path), exchange, self._report_status)

    async def serve_file(self, exchange: Exchange) -> None:
        task_id, _, name = exchange.path.removeprefix(FILES_PATH).partition("/")
        task = self._store.get_task(task_id)
        if task is None or name not in task.files:
            await exchange.respond(404, "text/plain; charset=utf-8", b"no such file\n")
            return
        record = RequestRecord(operation="file", path=exchange.path, user_key=task.user_key, task_id=task_id)
        fault = self._next_fault(record)
        if not await self._apply_early_fault(exchange, fault, record):
            return
        self._request_log.record_outcome(record, "served")
        if fault.reply in {"json", "cut"}:
            await send_file(exchange, self._store.task_folder(task_id) / name, fault)
        else:
            await break_response(exchange, fault)

    async def _handle_call(self, record: RequestRecord, exchange: Exchange, handler: _CallHandler) -> None:
        try:
            form = await read_form(exchange.header("content-type"), exchange.body())
        except ClientDisconnectedError:
            self._request_log.add(record)
            self._request_log.record_outcome(record, "client_disconnected")
            return
        record.user_key = form.fields.pop("user_key", "")
        record.fields = form.fields
        record.image_bytes = len(form.image or b"")
        fault = self._next_fault(record)
        if not await self._apply_early_fault(exchange, fault, record):
            return
        try:
            response = await handler(exchange, form, fault, record)
        except CallRefusedError as error:
            self._request_log.record_outcome(record, "refused", str(error))
            response = VendorResponse(err_code=1, err_msg=str(error))
        await send_response(exchange, response, fault)

    def _next_fault(self, record: RequestRecord) -> Fault:
        fault = self._fault_injector.next_fault(record.operation, record.user_key)
        record.reply = fault.reply
        self._request_log.add(record)
        return fault

    async def _apply_early_fault(self, exchange: Exchange, fault: Fault, record: RequestRecord) -> bool:
        """Wait for the latency of the fault, and return whether to process the request.

        It is processed even if its client disconnected: a slow server does not notice.
        """
        if fault.latency > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._shutdown_event.wait(), fault.latency)
                await exchange.wait_closed()
                return False
        if fault.when == "before":
            self._request_log.record_outcome(record, "not_processed")
            await break_response(exchange, fault)
            return False
        return True

    async def _accept_submit(
        self, kind: Kind, _: Exchange, form: Form, fault: Fault, record: RequestRecord
    ) -> VendorResponse:
        self._require_account(record.user_key, fault)
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
            raise CallRefusedError(f"{_REJECTION_PREFIX}{self._fault_injector.behaviour.colon}{error}") from None
        behaviour = self._fault_injector.behaviour
        # Must not await from here to the transaction: another submit could spend the same balance.
        balance = self._require_account(record.user_key, fault)
        charged_balance = balance.charge(behaviour.price_of(kind))
        if charged_balance is None:
            await self._worker.discard_files(task_id)
            raise CallRefusedError(NO_BALANCE)
        is_charged = behaviour.charge == "submit"
        seconds = self._seconds if behaviour.seconds is None else behaviour.seconds
        task = Task(
            id=task_id,
            user_key=record.user_key,
            kind=kind,
            options=options,
            ready_at=time.time() + seconds,
            is_charged=is_charged,
            planned_failure=fault.fail,
        )
        if is_charged:
            balance = charged_balance
        self._store.add_task(task, balance)
        self._worker.start(task)
        record.task_id = task_id
        self._request_log.record_outcome(record, "accepted")
        return VendorResponse(task_id=task_id, remaining_count=balance.count, remaining_money=balance.money)

    async def _report_status(
        self, exchange: Exchange, form: Form, fault: Fault, record: RequestRecord
    ) -> VendorResponse:
        balance = self._require_account(record.user_key, fault)
        record.task_id = form.fields.get("task_id", "")
        task = self._store.get_task(record.task_id)
        if task is None or task.user_key != record.user_key:
            raise CallRefusedError(UNKNOWN_TASK)
        detail, state = task.reason or "", str(task.state)
        if task.state == "open":
            state = "processing" if self._worker.is_running(task.id) else "pending"
        status = self._fault_injector.behaviour.format_state(state)
        self._request_log.record_outcome(record, "reported", f"{status}: {detail}" if detail else status)
        if task.state != "completed":
            return VendorResponse(status=status)
        if self._fault_injector.behaviour.checked_balance == "then" and task.balance is not None:
            balance = task.balance
        urls = {name: f"{exchange.base_url}{FILES_PATH}{task.id}/{name}" for name in task.files}
        return VendorResponse(
            status=status,
            images_url=urls.get("image.png", UNSET),
            vector_url=urls.get("vector.svg", UNSET),
            grid_url=urls.get("grid.png", UNSET),
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
