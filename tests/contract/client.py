"""The clients of the upstream and of artifacts, set up for their contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from msgspec.structs import replace

from service.clients.artifacts import ArtifactClient
from service.clients.upstream import UpstreamClient
from service.crypto import Keyring, UserKeyCipher
from service.domain.tasks import DEFAULT_CATALOGUE, Artifact, ArtifactName, FaceEnhanceOptions, Options
from service.domain.tenants import Account
from service.usecases.ports import ArtifactStream, CheckResult, Image, RangeRequest, SubmitResult

MAX_BYTES = 1_000_000
USER_KEY = "hush-hush-key"
CIPHER = UserKeyCipher(Keyring([bytes(32)]), "http://default.example")
LINKS = Keyring([bytes(32)]).derive("artifact-link")


def make_account(base_url: str | None = None) -> Account:
    account = Account(1, "main", b"", base_url)
    return replace(account, user_key=CIPHER.encrypt(USER_KEY.encode(), account))


ACCOUNT = make_account()
IMAGE = Image(b"\x89PNG" + bytes(range(256)) * 4, b"", "image/png", 8, 8)
LARGE = Image(bytes(4 << 20), b"", "image/jpeg", 8, 8)
_FACE = FaceEnhanceOptions()
_WHOLE = RangeRequest()


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

    async with UpstreamClient(base_url, CIPHER, DEFAULT_CATALOGUE, on_call=observe, links=LINKS) as client:
        yield Caller(client, event)


@dataclass
class Fetcher:
    """A client of artifacts, and the outcomes that it reported."""

    client: ArtifactClient
    outcomes: list[StrEnum]

    def fetch(
        self,
        url: str,
        name: ArtifactName = ArtifactName.IMAGE,
        *,
        account: Account | None = ACCOUNT,
        requested: RangeRequest = _WHOLE,
        recent: bool = False,
    ) -> AbstractAsyncContextManager[ArtifactStream]:
        return self.client.fetch(account, Artifact(name, url), requested, is_recent=recent)

    async def fetch_all(self, *arguments: Any, **options: Any) -> tuple[ArtifactStream, bytes]:
        async with self.fetch(*arguments, **options) as fetched:
            return fetched, b"".join([chunk async for chunk in fetched.chunks])


def make_fetcher(upstream_url: str = "http://127.0.0.1", **options: Any) -> Fetcher:
    """Return a client whose upstream is on localhost."""
    outcomes: list[StrEnum] = []

    def observe(_operation: StrEnum, outcome: StrEnum, _seconds: float) -> None:
        outcomes.append(outcome)

    ciphers: Any = {"user_keys": CIPHER, "links": LINKS}
    client = ArtifactClient(upstream_url, max_bytes=MAX_BYTES, on_call=observe, **ciphers, **options)
    return Fetcher(client, outcomes)
