"""Test double of the artifact client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from service.domain.media import sniff_type
from service.domain.tasks import Artifact
from service.domain.tenants import Account
from service.usecases.ports import ArtifactStream, Coverage, RangeRequest
from tests.support.images import make_png


@dataclass
class FakeArtifacts:
    """Artifacts that always returns the same whole image."""

    content: bytes = field(default_factory=make_png)
    requests: list[tuple[str | None, str]] = field(default_factory=list)
    """Account name and URL of each request."""

    @asynccontextmanager
    async def fetch(
        self, account: Account | None, artifact: Artifact, range_request: RangeRequest, is_recent: bool = False
    ) -> AsyncIterator[ArtifactStream]:
        del range_request, is_recent
        self.requests.append((account.name if account else None, artifact.url))
        yield ArtifactStream(
            name=artifact.name,
            coverage=Coverage.FULL,
            media_type=sniff_type(self.content),
            chunks=self._chunks(),
            length=len(self.content),
            etag='"1"',
        )

    async def _chunks(self) -> AsyncGenerator[bytes]:
        for start in range(0, len(self.content), 10):
            yield self.content[start : start + 10]
