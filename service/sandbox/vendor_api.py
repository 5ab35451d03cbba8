"""The vendor's API: calls, response formats and files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import Mapping
from http.client import responses
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from service.sandbox.faults import Fault, FaultInjector, Field, FieldDefect, Kind, RequestLog, RequestRecord
from service.sandbox.forms import FILE_FIELD, Form, RejectedError, parse_options, read_form
from service.sandbox.http import JSON_TYPE, TEXT_TYPE, ClientDisconnectedError, Exchange
from service.sandbox.store import AccountBalance, Store, Task
from service.sandbox.worker import Worker

UNKNOWN_ACCOUNT: Final = "账户不存在"
NO_BALANCE: Final = "账户剩余次数不足"
UNKNOWN_TASK: Final = "任务未找到或状态未知"
_REJECTION_PREFIX: Final = "任务提交失败"
_TASK_IDS: Final = range(10**15, 9 * 10**15)
"""Decimal and below 2**53, so that they are exact also as JSON numbers."""
_SUBMIT_KINDS: Final[dict[str, Kind]] = {
    "/api/submit_task": "upscale",
    "/api/submit_vector_task": "vector",
    "/api/submit_face_enhance_task": "face",
    "/api/submit_seamless_task": "seamless",
}
CALL_PATHS: Final = (*_SUBMIT_KINDS, "/api/check_task_status")
FILES_PATH: Final = "/files/"
_URL_FIELDS: Final = {"image.png": "images_url", "vector.svg": "vector_url", "grid.png": "grid_url"}
_CONTENT_TYPES: Final = {".png": "image/png", ".svg": "image/svg+xml"}
_CHUNK_BYTES: Final = 256 * 1024
_RANGE_PATTERN: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
VendorResponse: TypeAlias = dict[str, Any]


def _corrupt_fields(response: VendorResponse, defects: Mapping[Field, FieldDefect]) -> VendorResponse:
    """Return a response with defects in its fields. `null` also adds an absent field."""
    content = dict(response)
    for name, defect in defects.items():
        if defect == "null":
            content[name] = None
        elif defect == "missing":
            content.pop(name, None)
        elif name in content:
            content[name] = _corrupt_value(content[name], defect)
    return content


def _corrupt_value(value: str | int, defect: FieldDefect) -> str | int | float:
    if defect == "string":
        return str(value)
    number = int(value) if isinstance(value, int) or value.isdecimal() else 7
    if defect == "float":
        return number + 0.5
    return -1 - number if defect == "negative" else number


async def send_response(exchange: Exchange, response: VendorResponse, fault: Fault) -> None:
    """Send the response of a call with the defects of a fault."""
    if fault.reply in {"hang", "reset", "page"}:
        await break_response(exchange, fault)
        return
    body = msgspec.json.encode(_corrupt_fields(response, fault.wrong))
    if fault.reply == "garbled":
        body = body[: len(body) // 2]
    await exchange.send_head(fault.status, JSON_TYPE, len(body))
    if fault.reply == "cut":
        await exchange.send_body(body[: len(body) // 2], more=True)
        await exchange.close_connection()
    else:
        await exchange.send_body(body)


async def break_response(exchange: Exchange, fault: Fault) -> None:
    """Hang, reset the connection, or send a page of HTML."""
    if fault.reply == "page":
        await exchange.respond(fault.status, "text/html; charset=utf-8", _error_page(fault.status))
    elif fault.reply == "reset":
        await exchange.close_connection(reset=True)
    else:
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
        await exchange.close_connection()
    else:
        await exchange.send_body(b"")


def _resolve_range(match: re.Match[str], size: int) -> tuple[int, int]:
    """Return the range as a half-open interval, empty if it can't be satisfied."""
    first, last = match.groups()
    if first:
        return int(first), min(int(last) + 1, size) if last else size
    return (max(size - int(last), 0), size) if last else (0, 0)


def _error_page(status: int) -> bytes:
    title = f"{status} {responses.get(status, 'Error')}"
    return (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n"
        f"<center><h1>{title}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
    ).encode()


class CallRefusedError(Exception):
    """A call gets an error response; the text is the vendor's message."""


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

    async def serve_file(self, exchange: Exchange) -> None:
        task_id, _, name = exchange.path.removeprefix(FILES_PATH).partition("/")
        task = self._store.get_task(task_id)
        if task is None or name not in task.files:
            await exchange.respond(404, TEXT_TYPE, b"no such file\n")
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

    async def handle_call(self, exchange: Exchange) -> None:
        """Handle a submit or a check."""
        kind = _SUBMIT_KINDS.get(exchange.path)
        record = RequestRecord(operation="submit" if kind else "check", path=exchange.path)
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
            if kind:
                response = await self._accept_submit(kind, form, fault, record)
            else:
                response = self._report_status(exchange.base_url, form, fault, record)
        except CallRefusedError as error:
            self._request_log.record_outcome(record, "refused", str(error))
            response = {"err_code": 1, "err_msg": str(error)}
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

    async def _accept_submit(self, kind: Kind, form: Form, fault: Fault, record: RequestRecord) -> VendorResponse:
        self._require_account(record.user_key, fault)
        task_id = str(secrets.choice(_TASK_IDS))
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
        return {"err_code": 0, "task_id": task_id, **_balance_fields(balance)}

    def _report_status(self, base_url: str, form: Form, fault: Fault, record: RequestRecord) -> VendorResponse:
        balance = self._require_account(record.user_key, fault)
        record.task_id = form.fields.get("task_id", "")
        task = self._store.get_task(record.task_id)
        if task is None or task.user_key != record.user_key:
            raise CallRefusedError(UNKNOWN_TASK)
        detail, state = task.reason or "", str(task.state)
        if task.state == "open":
            state = "processing" if task.id in self._worker.running_ids else "pending"
        status = self._fault_injector.behaviour.format_state(state)
        self._request_log.record_outcome(record, "reported", f"{status}: {detail}" if detail else status)
        if task.state != "completed":
            return {"err_code": 0, "status": status}
        if self._fault_injector.behaviour.checked_balance == "then" and task.balance is not None:
            balance = task.balance
        urls = {_URL_FIELDS[name]: f"{base_url}{FILES_PATH}{task.id}/{name}" for name in task.files}
        return {"err_code": 0, "status": status, **urls, **_balance_fields(balance)}

    def _require_account(self, user_key: str, fault: Fault) -> AccountBalance:
        balance = self._store.get_balance(user_key)
        if balance is None:
            raise CallRefusedError(UNKNOWN_ACCOUNT)
        if fault.refuse is not None:
            raise CallRefusedError(fault.refuse)
        return balance


def _balance_fields(balance: AccountBalance) -> VendorResponse:
    return {"remaining_count": balance.count, "remaining_money": balance.money}
