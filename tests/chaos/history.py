"""What happened in a run: requests of callers, faults, and violations."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Fault:
    """One injected fault. `content` is that of the submission it hit, if it hit one only."""

    name: str
    started_at: float
    ended_at: float
    content: str = ""


@dataclass(eq=False)
class Attempt:
    """One request of a caller that submits; times are monotonic seconds.

    `status` is 0 without a response. Attempts with the same content are one submission, under the idempotency key.
    """

    content: str
    tenant: str
    kind: str
    key: str = ""
    started_at: float = field(default_factory=time.monotonic)
    ended_at: float = math.inf
    status: int = 0
    code: str = ""
    task: str = ""
    submission: str = ""


@dataclass(frozen=True)
class Violation:
    """A broken promise: `rule` names it, `at` is the monotonic time of its cause."""

    rule: str
    detail: str
    at: float
    contents: frozenset[str] = frozenset()


@dataclass
class History:
    """A run's record.

    The store lost everything at `flushed_at`, and its clock passed all leases at `advanced_at`. `folder` has the logs.
    """

    started_at: float = field(default_factory=time.monotonic)
    faults: list[Fault] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    requests: int = 0
    violations: list[Violation] = field(default_factory=list)
    flushed_at: list[float] = field(default_factory=list)
    advanced_at: list[float] = field(default_factory=list)
    folder: str = ""

    def add_fault(self, name: str, content: str = "", seconds: float = 0) -> None:
        now = time.monotonic()
        self.faults.append(Fault(name, now, now + seconds, content))

    @contextmanager
    def record_fault(self, name: str) -> Iterator[None]:
        """Record a fault that lasts as long as the block."""
        fault = Fault(name, time.monotonic(), math.inf)
        self.faults.append(fault)
        try:
            yield
        finally:
            fault.ended_at = time.monotonic()

    def add_violation(self, rule: str, detail: str, *, at: float = 0, contents: frozenset[str] = frozenset()) -> None:
        self.violations.append(Violation(rule, detail, at or time.monotonic(), contents))

    def epoch(self, at: float) -> int:
        """Return how often the store had lost everything by then."""
        return sum(flushed_at <= at for flushed_at in self.flushed_at)

    def is_cut_off(self, start: float, end: float) -> bool:
        """Return whether gateways were cut off from the store at some time of an interval."""
        return any(self.is_affected(name, start, end) for name in ("store-", "connections-cut", "answers-lost"))

    def is_affected(self, name: str, start: float, end: float) -> bool:
        """Return whether a fault whose name starts so overlaps an interval."""
        return any(
            fault.name.startswith(name) and fault.started_at <= end and fault.ended_at >= start for fault in self.faults
        )
