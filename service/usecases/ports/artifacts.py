"""The files that results are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Protocol

from msgspec import Struct

from service.domain.tasks import Artifact, ArtifactName
from service.domain.tenants import Account


class BrokenOff(Exception):
    """The rest of a result can't be had, or there is more of it than there may be: what came is not the result."""


class Asked(Struct, frozen=True, kw_only=True):
    """What of a file is asked for, in HTTP's own words (RFC 9110); `range` is one range of bytes."""

    range: str | None = None
    if_range: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None


class Portion(StrEnum):
    """How much of a file is given."""

    WHOLE = "whole"
    PART = "part"
    NOTHING = "nothing"
    """It is still the one that is known."""


class Fetched(Struct, frozen=True, kw_only=True):
    """A file as it comes. `length` in bytes is of what is given, where it is known beforehand.

    What has no description here is in HTTP's own words. `chunks` never holds more than a few of them, so that who reads
    slowly is waited for. It raises BrokenOff.
    """

    name: ArtifactName
    portion: Portion
    media_type: str
    chunks: AsyncIterator[bytes]
    length: int | None = None
    content_range: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    accept_ranges: str | None = None


class Artifacts(Protocol):
    """Where results are kept."""

    def fetch(
        self, account: Account | None, artifact: Artifact, asked: Asked, *, recent: bool = False
    ) -> AbstractAsyncContextManager[Fetched]:
        """A result of a task of this account, None if that is gone. The fetch ends with the block at the latest.

        A result that is `recent` may not have arrived where it is kept: until it has, UpstreamUnavailable is raised.

        Goes to public addresses only, and to the account's own upstream. Entering raises UpstreamInvalidResponse,
        UpstreamUnavailable, RangeNotSatisfiable or Overloaded, always before anything is given.
        """
        ...
