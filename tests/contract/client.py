"""The upstream client, set up for its contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from service.clients.upstream import UpstreamClient
from service.crypto import Keyring
from service.domain.tasks import DEFAULT_CATALOGUE, FaceEnhanceOptions, Options
from service.domain.tenants import Account
from service.usecases.ports import CheckResult, Image, SubmitResult

USER_KEY = "hush-hush-key"
CIPHER = Keyring([bytes(32)]).derive("user-key")
ACCOUNT = Account(1, "main", CIPHER.encrypt(USER_KEY.encode()))
IMAGE = Image(b"\x89PNG" + bytes(range(256)) * 4, b"", "image/png", 8, 8)
LARGE = Image(bytes(4 << 20), b"", "image/jpeg", 8, 8)
_FACE = FaceEnhanceOptions()


@dataclass
class Caller:
    """A client, and what it reported to its observer."""

    client: UpstreamClient
    observations: list[tuple[StrEnum, StrEnum]] = field(default_factory=list)

    async def submit(
        self, *, account: Account = ACCOUNT, options: Options = _FACE, image: Image = IMAGE, seconds: float = 10
    ) -> SubmitResult:
        return await self.client.submit(account, options, image, timeout_seconds=seconds)

    async def check(self, upstream_id: str = "t-1", *, account: Account = ACCOUNT) -> CheckResult:
        return await self.client.check(account, upstream_id)


@asynccontextmanager
async def open_caller(base_url: str) -> AsyncIterator[Caller]:
    event: list[tuple[StrEnum, StrEnum]] = []

    def observe(operation: StrEnum, outcome: StrEnum, seconds: float) -> None:
        assert 0 <= seconds < 60
        event.append((operation, outcome))

    async with UpstreamClient(base_url, CIPHER, DEFAULT_CATALOGUE, on_call=observe) as client:
        yield Caller(client, event)
