"""The sealed reference behind a task's id.

An id holds all that is needed to ask the upstream about a task, so a task that was paid for can be read even after
Redis lost everything. It is encrypted and authenticated: nobody can read, alter or make one without a secret key.
"""

from __future__ import annotations

import base64
import binascii
from typing import Protocol

import msgspec
from msgspec import Struct

from service.domain.errors import NotFound
from service.domain.task import Kind

PREFIX = "task_"


class Sealer(Protocol):
    """Authenticated, deterministic encryption under the gateway's secret keys."""

    def seal(self, plain: bytes) -> bytes:
        """Encrypt under the first key."""
        ...

    def open(self, sealed: bytes) -> bytes | None:
        """Decrypt under whichever key fits; None if none does or the bytes were altered."""
        ...


class Reference(Struct, frozen=True, array_like=True):
    """What an id stands for: ids of tenant and account that are never reused, `created` in ms since the epoch."""

    tenant: int
    account: int
    kind: Kind
    created: int
    reservation: str
    upstream_id: str


class TaskIds:
    """Turns references into ids and back."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def seal(self, reference: Reference) -> str:
        """The id of a reference; the same reference has the same id under the same keys."""
        sealed = self._sealer.seal(msgspec.msgpack.encode(reference))
        return PREFIX + base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def open(self, task_id: str) -> Reference:
        """The reference of an id. Raises NotFound for anything that is not exactly an id made by `seal`."""
        text = task_id.removeprefix(PREFIX)
        try:
            sealed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            plain = self._sealer.open(sealed) if PREFIX + text == task_id else None
            if plain is not None and base64.urlsafe_b64encode(sealed).rstrip(b"=").decode() == text:
                return msgspec.msgpack.decode(plain, type=Reference)
        except (binascii.Error, msgspec.DecodeError, ValueError):
            pass
        raise NotFound("There is no such task.")
