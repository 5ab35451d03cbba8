"""The vendor's API, and what it answers."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from msgspec import Struct

from service.domain.ledger import Figures
from service.domain.tasks import Artifact, Options, TaskError
from service.domain.tenants import Account


class Image(Struct, frozen=True):
    """An uploaded image: its bytes, their SHA-256, what they are, and how many pixels they hold."""

    data: bytes
    sha256: bytes
    media_type: str
    width: int
    height: int


class Answered(StrEnum):
    """What a check of a task amounted to."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SILENT = "silent"
    """It was answered, but with nothing about the task: not found, or a null state."""
    UNUSABLE = "unusable"
    """It was answered, but with something that can't be used, as an end without its results."""
    NOTHING = "nothing"
    """It was not answered, or not by the vendor."""


class Check(Struct, frozen=True, kw_only=True):
    """The result of asking the upstream about a task. Settling its balance is part of recording it."""

    answered: Answered
    artifacts: tuple[Artifact, ...] = ()
    error: TaskError | None = None
    figures: Figures = Figures()


class SubmitOutcome(StrEnum):
    """What became of a submit, as far as money is concerned."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EXHAUSTED = "exhausted"
    INVALID_ACCOUNT = "invalid-account"
    MISCONFIGURED = "misconfigured"
    """Nothing was sent, since the account's key can't be opened, which no waiting helps."""
    REDIRECTED = "redirected"
    """Refused with a redirect, which is not followed: the base address of the account is wrong."""
    BUSY = "busy"
    """Refused for now with HTTP 429."""
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class Submitted(Struct, frozen=True, kw_only=True):
    """The outcome of a submit, with the upstream's task id if accepted and its reason if rejected.

    `retry_after` is in seconds, where a busy upstream names them.
    """

    outcome: SubmitOutcome
    upstream_id: str = ""
    figures: Figures = Figures()
    reason: str = ""
    retry_after: float | None = None


class Upstream(Protocol):
    """The vendor's API, one verb per operation. Neither call raises for anything the network or the vendor does."""

    async def submit(self, account: Account, options: Options, image: Image, *, seconds: float) -> Submitted:
        """Send an image once, within `seconds` all told. Never sends twice; NOT_SENT only if no connection was made."""
        ...

    async def check(self, account: Account, upstream_id: str) -> Check:
        """Ask about a task."""
        ...
