"""Behaviour of the sandbox, its faults, and the log of its requests.

`Behaviour` applies to every request until it is replaced:

| field             | values                                | meaning                                            |
| ----------------- | ------------------------------------- | -------------------------------------------------- |
| `seconds`         | number, or null: as configured        | minimum duration of a task                         |
| `prices`          | yuan by kind                          | price of a task once the prepaid uses are spent    |
| `charge`          | `submit`, `end`                       | time of the charge; at the end only if completed   |
| `checked_balance` | `now`, `then`                         | balance of a finished task: current, or at its end |
| `spelling`        | `Completed`, `COMPLETED`, `completed` | letter case of every state                         |
| `colon`           | `:`, `：`                             | in 任务提交失败:{reason}                           |
| `faults`          | list of faults                        | the first that matches a request applies, alone    |

A `Fault` selects requests and changes their response:

| field      | values                                            | meaning                                            |
| ---------- | ------------------------------------------------- | -------------------------------------------------- |
| `on`       | `submit`, `check`, `file`, or null                | null: submits and checks                           |
| `user_key` | text, or null: any                                | for a file, the key of the task's owner            |
| `times`    | number of requests, or null: unlimited            | the fault is removed afterwards                    |
| `latency`  | seconds                                           | delay before the request is processed              |
| `reply`    | `json`                                            | the response itself                                |
|            | `hang`                                            | no response                                        |
|            | `reset`                                           | TCP reset                                          |
|            | `page`                                            | a web server's HTML page, mostly with `status`     |
|            | `cut`                                             | half the body that `Content-Length` announced      |
|            | `garbled`                                         | a complete body with half the JSON                 |
| `when`     | `before`, `after`                                 | `hang`, `reset` and `page` come before or after    |
|            |                                                   | the request is processed (charged, no response)    |
| `status`   | HTTP status                                       | of the response                                    |
| `refuse`   | text                                              | error response with this `err_msg`                 |
| `reject`   | text                                              | submits only: 任务提交失败 with this reason        |
| `fail`     | text                                              | submits only: the task is accepted and ends Failed |
| `wrong`    | by field: `string`, `int`, `float`, `negative`,   | the field gets a wrong type or value               |
|            | `null`, `missing`                                 |                                                    |
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal["upscale", "vector", "face", "seamless"]
RequestType: TypeAlias = Literal["submit", "check", "file"]
Reply: TypeAlias = Literal["json", "hang", "reset", "page", "cut", "garbled"]
FieldDefect: TypeAlias = Literal["string", "int", "float", "negative", "null", "missing"]
Field: TypeAlias = Literal[
    "err_code",
    "err_msg",
    "task_id",
    "status",
    "images_url",
    "vector_url",
    "grid_url",
    "remaining_count",
    "remaining_money",
]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Yuan: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
DEFAULT_PRICES: Final[dict[Kind, int]] = {"upscale": 3, "vector": 2, "face": 1, "seamless": 1}
"""In yuan. The vendor publishes no prices."""


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A fault; the module docstring explains the fields."""

    on: RequestType | None = None
    user_key: str | None = None
    times: Annotated[int, msgspec.Meta(ge=1)] | None = None

    latency: Seconds = 0.0
    reply: Reply = "json"
    when: Literal["before", "after"] = "after"
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] = 200
    refuse: str | None = None
    reject: str | None = None
    fail: str | None = None
    wrong: dict[Field, FieldDefect] = {}

    def __post_init__(self) -> None:
        """Reject combinations without effect. Raises ValueError (ValidationError while decoding)."""
        if self.when == "before" and self.reply not in {"hang", "reset", "page"}:
            raise ValueError(f"`when: before` goes with hang, reset or page, not with {self.reply}")
        if self.on not in {"submit", None} and (self.reject is not None or self.fail is not None):
            raise ValueError("`reject` and `fail` are about submits")
        if self.on == "file" and (self.refuse is not None or self.wrong or self.reply == "garbled"):
            raise ValueError("`refuse`, `wrong` and `garbled` are about JSON, and a file has none")
        if self.on == "file" and self.status != 200 and self.reply != "page":
            raise ValueError("a file with another `status` is a `page`")

    def matches(self, operation: RequestType, user_key: str) -> bool:
        is_selected = operation != "file" if self.on is None else operation == self.on
        return is_selected and self.user_key in {None, user_key}


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Behaviour of the sandbox; the module docstring explains the fields."""

    seconds: Seconds | None = None
    prices: dict[Kind, Yuan] = {}
    charge: Literal["submit", "end"] = "submit"
    checked_balance: Literal["now", "then"] = "now"
    spelling: Literal["Completed", "COMPLETED", "completed"] = "Completed"
    colon: Literal[":", "："] = ":"
    faults: tuple[Fault, ...] = ()

    def price_of(self, kind: Kind) -> int:
        return self.prices.get(kind, DEFAULT_PRICES[kind])

    def format_state(self, state: str) -> str:
        if self.spelling == "COMPLETED":
            return state.upper()
        return state.lower() if self.spelling == "completed" else state.capitalize()


class FaultInjector:
    """Holds the current behaviour, which may be replaced at any time."""

    def __init__(self) -> None:
        self.behaviour = Behaviour()

    def next_fault(self, operation: RequestType, user_key: str) -> Fault:
        """Return the fault for a request, and count it."""
        faults = self.behaviour.faults
        for index, fault in enumerate(faults):
            if not fault.matches(operation, user_key):
                continue
            if fault.times is not None:
                remaining = () if fault.times == 1 else (msgspec.structs.replace(fault, times=fault.times - 1),)
                faults = faults[:index] + remaining + faults[index + 1 :]
                self.behaviour = msgspec.structs.replace(self.behaviour, faults=faults)
            return fault
        return Fault()


_MAX_RECORDS: Final = 10_000
RequestOutcome: TypeAlias = Literal[
    "pending", "not_processed", "accepted", "refused", "reported", "served", "client_disconnected"
]


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request. `detail` is the error message or the state of the task; `fields` omits the `user_key`."""

    operation: RequestType
    path: str
    received_at: float = msgspec.field(default_factory=time.time)
    user_key: str = ""
    task_id: str = ""
    outcome: RequestOutcome = "pending"
    detail: str = ""
    reply: Reply = "json"
    image_bytes: int = 0
    fields: dict[str, str] = {}


class RequestLog:
    """The newest requests, oldest first."""

    def __init__(self) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=_MAX_RECORDS)
        self._change_event = asyncio.Event()

    def add(self, record: RequestRecord) -> None:
        self._records.append(record)
        self._notify()

    def record_outcome(self, record: RequestRecord, outcome: RequestOutcome, detail: str = "") -> None:
        record.outcome = outcome
        record.detail = detail
        self._notify()

    def records(self) -> list[RequestRecord]:
        """Return copies, which do not change with their requests."""
        return [msgspec.structs.replace(record) for record in self._records]

    def clear(self) -> None:
        self._records.clear()
        self._notify()

    async def wait_until(self, predicate: Callable[[Sequence[RequestRecord]], bool]) -> list[RequestRecord]:
        """Wait until the predicate is true of the records, and return them."""
        while not predicate(records := self.records()):
            await self._change_event.wait()
        return records

    def _notify(self) -> None:
        self._change_event.set()
        self._change_event = asyncio.Event()
