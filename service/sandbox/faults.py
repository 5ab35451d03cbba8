"""Fault injection and the record of requests."""

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
"""What a task of each kind costs in yuan unless the dials say otherwise. The vendor publishes no prices."""


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What goes wrong, and with which requests; the module's docstring explains every field."""

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
        """Refuse combinations that would silently do nothing.

        Raises:
            ValueError: with the reason; while decoding, msgspec turns it into a `ValidationError`.

        """
        if self.when == "before" and self.reply not in {"hang", "reset", "page"}:
            raise ValueError(f"`when: before` goes with hang, reset or page, not with {self.reply}")
        if self.on not in {"submit", None} and (self.reject is not None or self.fail is not None):
            raise ValueError("`reject` and `fail` are about submits")
        if self.on == "file" and (self.refuse is not None or self.wrong or self.reply == "garbled"):
            raise ValueError("`refuse`, `wrong` and `garbled` are about JSON, and a file has none")
        if self.on == "file" and self.status != 200 and self.reply != "page":
            raise ValueError("a file with another `status` is a `page`")

    def matches(self, operation: RequestType, user_key: str) -> bool:
        """Say whether this fault is about such a request."""
        concerns = operation != "file" if self.on is None else operation == self.on
        return concerns and self.user_key in {None, user_key}


NO_FAULT: Final = Fault()


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the upstream behaves; the module's docstring explains every dial."""

    seconds: Seconds | None = None
    prices: dict[Kind, Yuan] = {}
    charge: Literal["submit", "end"] = "submit"
    checked_balance: Literal["now", "then"] = "now"
    spelling: Literal["Completed", "COMPLETED", "completed"] = "Completed"
    colon: Literal[
        ":",
        "：",
    ] = ":"
    faults: tuple[Fault, ...] = ()

    def price_of(self, kind: Kind) -> int:
        """Give the price of a task in yuan."""
        return self.prices.get(kind, DEFAULT_PRICES[kind])

    def format_state(self, state: str) -> str:
        """Write a state in the letter case that is set."""
        if self.spelling == "COMPLETED":
            return state.upper()
        return state.lower() if self.spelling == "completed" else state.capitalize()

    def next_fault(self, operation: RequestType, user_key: str) -> tuple[Fault, Behaviour]:
        """Give the fault that hits this request, and the dials as they are after it."""
        for place, fault in enumerate(self.faults):
            if not fault.matches(operation, user_key):
                continue
            if fault.times is None:
                return fault, self
            left = () if fault.times == 1 else (msgspec.structs.replace(fault, times=fault.times - 1),)
            faults = self.faults[:place] + left + self.faults[place + 1 :]
            return fault, msgspec.structs.replace(self, faults=faults)
        return NO_FAULT, self


class FaultInjector:
    """Holds the dials in force.

    Attributes:
        dials: may be replaced at any time.

    """

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour

    def next_fault(self, operation: RequestType, user_key: str) -> Fault:
        """Give the fault that hits this request, and count it."""
        fault, self.behaviour = self.behaviour.next_fault(operation, user_key)
        return fault


_MAX_RECORDS: Final = 10_000
RequestOutcome: TypeAlias = Literal["arrived", "not_reached", "accepted", "refused", "told", "served", "broken_off"]
"""What the upstream did with a request.

- `arrived`: nothing yet, it is still being looked at;
- `not_reached`: nothing, a fault came before;
- `accepted`: a submit became a task;
- `refused`: the answer is an error, and nothing else happened;
- `told`: a check found its task;
- `served`: a file was handed out;
- `broken_off`: the client left in the middle of the request.
"""


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request.

    Attributes:
        at: when it had been read, in seconds since the epoch.
        path: it was sent to.
        task_id: of the task that was accepted, asked for or whose file it is; empty if there is none.
        outcome: what the upstream did with it.
        detail: the error message, or the state that was told.
        reply: how it was answered.
        image_bytes: size of the image; 0 if there was none.
        fields: the text fields, without the `user_key`.

    """

    operation: RequestType
    path: str
    received_at: float = msgspec.field(default_factory=time.time)
    user_key: str = ""
    task_id: str = ""
    outcome: RequestOutcome = "arrived"
    detail: str = ""
    reply: Reply = "json"
    image_bytes: int = 0
    fields: dict[str, str] = {}


class RequestLog:
    """Keeps the newest requests, oldest first."""

    def __init__(self) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=_MAX_RECORDS)
        self._change_event = asyncio.Event()

    def add(self, entry: RequestRecord) -> None:
        """Write a request down."""
        self._records.append(entry)
        self._notify()

    def record_outcome(self, entry: RequestRecord, outcome: RequestOutcome, detail: str = "") -> None:
        """Write down what became of a request."""
        entry.outcome = outcome
        entry.detail = detail
        self._notify()

    def records(self) -> list[RequestRecord]:
        """Give copies of all entries."""
        return [msgspec.structs.replace(entry) for entry in self._records]

    def clear(self) -> None:
        """Forget everything."""
        self._records.clear()
        self._notify()

    async def wait_until(self, predicate: Callable[[Sequence[RequestRecord]], bool]) -> list[RequestRecord]:
        """Wait until something holds of the entries, and give them."""
        while not predicate(entries := self.records()):
            await self._change_event.wait()
        return entries

    def _notify(self) -> None:
        self._change_event.set()
        self._change_event = asyncio.Event()
