"""A vendor that keeps its own truth: what it received, accepted and charged, and how it answered.

A submission is identified by the marker in its image. Faults are chosen at random per request.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tests.chaos.history import History
from tests.contract.scripted_server import PNG_IMAGE, Connection, file_response, http_response, run_server

KINDS = {
    "submit_task": "upscale",
    "submit_vector_task": "vectorize",
    "submit_face_enhance_task": "face-enhance",
    "submit_seamless_task": "seamless",
}
PRICES = {"upscale": 3, "vectorize": 2, "face-enhance": 1, "seamless": 1}
"""In yuan, once the prepaid uses are spent."""
FAULT_SHARE = 0.3
SUBMIT_FAULTS = {
    "submit-slow": 6,
    "submit-hang-before": 2,
    "submit-hang-after": 2,
    "submit-reset-before": 2,
    "submit-reset-after": 3,
    "submit-error-before": 3,
    "submit-error-after": 2,
    "submit-page": 2,
    "submit-torn": 2,
    "submit-garbled": 2,
    "submit-odd": 5,
    "submit-reject": 4,
    "submit-busy": 3,
    "submit-no-figures": 3,
    "task-fails": 6,
}
"""Faults with their weights; before and after: the task is accepted."""
CHECK_FAULTS = {
    "check-slow": 4,
    "check-hang": 1,
    "check-reset": 3,
    "check-error": 4,
    "check-page": 3,
    "check-torn": 2,
    "check-garbled": 2,
    "check-odd": 4,
    "check-unknown": 3,
}
FILE_FAULTS = {"file-missing": 3, "file-reset": 2, "file-page": 2}
VENDOR_FAULTS = (*SUBMIT_FAULTS, *CHECK_FAULTS, *FILE_FAULTS)
_FIELD = rb'name="?%b"?[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n(.*?)\r\n--'
_MARKER = re.compile(rb"content:([0-9a-f]{16})")
_PAGE = "<html><body>服务器错误 502 Bad Gateway</body></html>".encode()
_HANG_SECONDS = (1.0, 8.0)


class Reply(StrEnum):
    """What the gateway could read of a response to a submit."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNUSABLE = "unusable"


@dataclass(eq=False)
class VendorAccount:
    """An account. Its balance is shown without the charges that are made at the end of a task."""

    key: str
    count: int = 0
    money: int = 0
    charges_at_end: bool = False
    refunds_failures: bool = False
    uncharged: list[VendorTask] = field(default_factory=list)

    def charge(self, kind: str) -> tuple[int, int] | None:
        """Take a use, else the price; return both, or None if the account has neither."""
        if self.count > 0:
            self.count -= 1
            return 1, 0
        if self.money >= PRICES[kind]:
            self.money -= PRICES[kind]
            return 0, PRICES[kind]
        return None

    def figures(self) -> dict[str, int]:
        return {
            "remaining_count": self.count + sum(task.count for task in self.uncharged),
            "remaining_money": self.money + sum(task.money for task in self.uncharged),
        }

    def spend_elsewhere(self) -> None:
        self.charge("seamless")


@dataclass(eq=False)
class VendorTask:
    """An accepted task with its charge in uses and yuan."""

    id: str
    content: str
    kind: str
    account: VendorAccount
    ends_at: float
    fails: bool
    count: int
    money: int
    is_charged: bool = True
    is_refunded: bool = False
    was_reported_unknown: bool = False

    def finish(self) -> bool:
        """Return whether it has ended; charge or refund it then."""
        if time.monotonic() < self.ends_at:
            return False
        if not self.is_charged:
            self.is_charged = True
            self.account.uncharged.remove(self)
            if self.fails:  # nothing is charged for it
                self.refund()
        elif self.fails and self.account.refunds_failures and not self.is_refunded:
            self.refund()
        return True

    def refund(self) -> None:
        self.is_refunded = True
        self.account.count += self.count
        self.account.money += self.money


@dataclass(eq=False)
class Receipt:
    """A submit that the vendor has received."""

    content: str
    account: str
    at: float
    reply: Reply = Reply.UNUSABLE
    task: VendorTask | None = None


@dataclass
class Vendor:
    """The vendor of a run; `faults` are the names of those that it may choose."""

    history: History
    randomness: random.Random
    faults: Collection[str]
    url: str = ""
    accounts: dict[str, VendorAccount] = field(default_factory=dict)
    tasks: dict[str, VendorTask] = field(default_factory=dict)
    receipts: dict[str, list[Receipt]] = field(default_factory=lambda: defaultdict(list))
    next_submit: asyncio.Event = field(default_factory=asyncio.Event)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    def accepted(self, content: str) -> list[VendorTask]:
        return [receipt.task for receipt in self.receipts.get(content, ()) if receipt.task]

    async def serve(self, connection: Connection) -> None:
        while head := await connection.receive():
            _, body = connection.server.requests.pop()
            path = head.split(" ", 2)[1].removeprefix("/api/")
            if path in KINDS:
                await self._submit(connection, KINDS[path], body)
            elif path == "check_task_status":
                await self._check(connection, body)
            else:
                await self._send_file(connection)

    def _choose(self, weights: dict[str, int], content: str = "") -> str:
        """Return the name of a fault, or an empty one."""
        if self.randomness.random() >= FAULT_SHARE:
            return ""
        (name,) = self.randomness.choices(list(weights), list(weights.values()))
        if name not in self.faults:
            return ""
        self.history.add_fault(name, content, 1)
        return name

    async def _submit(self, connection: Connection, kind: str, body: bytes) -> None:
        marker, account = _MARKER.search(body), self.accounts.get(_find_field(body, "user_key"))
        if marker is None:
            raise AssertionError("a submit without a marked image")
        content = marker[1].decode()
        receipt = Receipt(content, account.key if account else "", time.monotonic())
        self.receipts[content].append(receipt)
        self.next_submit.set()
        self.next_submit = asyncio.Event()
        fault = self._choose(SUBMIT_FAULTS, content)
        await asyncio.sleep(self.randomness.uniform(0.5, 3) if fault == "submit-slow" else 0.01)
        if await self._answer_unprocessed(connection, fault, receipt):
            return
        charged = account.charge(kind) if account else None
        if account is None or charged is None:
            receipt.reply = Reply.REFUSED
            await _send_json(connection, err_code=1, err_msg="账户剩余次数不足" if account else "账户不存在")
            return
        task = VendorTask(
            f"vt-{next(self._numbers)}",
            content,
            kind,
            account,
            time.monotonic() + self.randomness.expovariate(1),
            fault == "task-fails",
            *charged,
        )
        self.tasks[task.id] = receipt.task = task
        if account.charges_at_end:
            task.is_charged = False
            account.uncharged.append(task)
        await self._answer_accepted(connection, fault, receipt, task)

    async def _answer_unprocessed(self, connection: Connection, fault: str, receipt: Receipt) -> bool:
        """Answer a submit that is not accepted because of a fault."""
        if fault == "submit-hang-before":
            await self._hang(connection)
        elif fault == "submit-reset-before":
            connection.reset()
        elif fault == "submit-error-before":
            await connection.send(http_response(_PAGE, 503, Content_Type="text/html"))
        elif fault == "submit-page":
            await connection.send(http_response(_PAGE, 200, Content_Type="text/html"))
        elif fault == "submit-reject":
            receipt.reply = Reply.REFUSED
            await _send_json(connection, err_code=1, err_msg="任务提交失败:图片过大")
        elif fault == "submit-busy":
            receipt.reply = Reply.REFUSED
            await connection.send(http_response(b"{}", 429, Retry_After="1"))
        else:
            return False
        return True

    async def _answer_accepted(self, connection: Connection, fault: str, receipt: Receipt, task: VendorTask) -> None:
        content = {"err_code": 0, "task_id": task.id, **task.account.figures()}
        if fault == "submit-hang-after":
            await self._hang(connection)
        elif fault == "submit-reset-after":
            connection.reset()
        elif fault == "submit-error-after":
            await connection.send(http_response(_PAGE, 502, Content_Type="text/html"))
        elif fault == "submit-torn":
            body = json.dumps(content).encode()
            await connection.send(http_response(body)[: -len(body) // 2])
            connection.reset()
        elif fault == "submit-garbled":
            await connection.send(http_response(json.dumps(content)[:14].encode()))
        else:
            receipt.reply = Reply.ACCEPTED
            if fault == "submit-no-figures":
                content = {"err_code": 0, "task_id": task.id}
            await connection.send(self._odd_response(content) if fault == "submit-odd" else _json_response(content))

    async def _check(self, connection: Connection, body: bytes) -> None:
        task, fault = self.tasks.get(_find_field(body, "task_id")), self._choose(CHECK_FAULTS)
        if fault == "check-slow":
            await asyncio.sleep(self.randomness.uniform(0.3, 2))
        content: dict[str, Any] = {"err_code": 0, "status": "Processing"}
        if task is None or (fault == "check-unknown" and not task.was_reported_unknown):
            # Once per task: unknown before and after a clock step, it would count as lost.
            if task:
                task.was_reported_unknown = True
            content = {"err_code": 1, "err_msg": "任务未找到或状态未知"}
        elif task.finish():
            status = "Failed" if task.fails else self.randomness.choice(["Completed", "COMPLETED"])
            links = {} if task.fails else {"images_url": f"{self.url}/files/{task.id}.png"}
            content = {"err_code": 0, "status": status, **links, **task.account.figures()}
        response = _json_response(content)
        if fault == "check-hang":
            await self._hang(connection)
        elif fault == "check-reset":
            connection.reset()
        elif fault == "check-error":
            await connection.send(http_response(_PAGE, 500, Content_Type="text/html"))
        elif fault == "check-page":
            await connection.send(http_response(_PAGE, Content_Type="text/html"))
        elif fault == "check-torn":
            await connection.send(response[:-5])
            connection.reset()
        elif fault == "check-garbled":
            await connection.send(http_response(json.dumps(content)[:-8].encode()))
        else:
            await connection.send(self._odd_response(content) if fault == "check-odd" else response)

    async def _send_file(self, connection: Connection) -> None:
        fault = self._choose(FILE_FAULTS)
        if fault == "file-missing":
            await connection.send(http_response(b"", 404))
        elif fault == "file-page":
            await connection.send(http_response(_PAGE, 502, Content_Type="text/html"))
        elif fault == "file-reset":
            await connection.send(file_response()[:-40])
            connection.reset()
        else:
            await connection.send(file_response(PNG_IMAGE))

    async def _hang(self, connection: Connection) -> None:
        await asyncio.sleep(self.randomness.uniform(*_HANG_SECONDS))
        connection.reset()

    def _odd_response(self, content: dict[str, Any]) -> bytes:
        """Return a response whose form is unusual, but whose meaning is clear."""
        form = self.randomness.choice(["bom", "gb18030", "nan", "texts", "line breaks"])
        if form == "bom":
            return http_response(b"\xef\xbb\xbf" + json.dumps(content).encode())
        if form == "gb18030":
            return http_response(json.dumps(content | {"msg": "成功"}, ensure_ascii=False).encode("gb18030"))
        if form == "nan":
            return http_response(json.dumps(content | {"seconds": float("nan")}).encode())
        if form == "texts":
            return http_response(json.dumps({name: str(value) for name, value in content.items()}).encode())
        return http_response(json.dumps(content | {"msg": "a-b"}).replace("a-b", "a\r\n\tb").encode())


def _find_field(body: bytes, name: str) -> str:
    """Return a field of a form, multipart or URL-encoded."""
    if match := re.search(_FIELD % name.encode(), body, re.DOTALL):
        return match[1].decode()
    match = re.search(rb"(?:^|&)%b=([^&]*)" % name.encode(), body)
    return match[1].decode() if match else ""


def _json_response(content: dict[str, Any]) -> bytes:
    return http_response(json.dumps(content, ensure_ascii=False).encode(), Content_Type="application/json")


async def _send_json(connection: Connection, **content: Any) -> None:
    await connection.send(_json_response(content))


@asynccontextmanager
async def run_vendor(vendor: Vendor) -> AsyncIterator[None]:
    async with run_server(vendor.serve) as server:
        vendor.url = server.url
        yield
