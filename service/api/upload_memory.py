"""Memory that uploads share, and their queue."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

from msgspec import Struct

from service.domain.errors import Overloaded
from service.memory import release_free_memory

_TENANTS, _UNKNOWN = ("tenants",), ("unknown",)
"""Labels of the pools of memory in metrics."""


class Allocation(Struct, eq=False):
    """Memory of one upload: requested, granted, and finally shrunk to nothing.

    `owner` is the id of a tenant, None for a caller that is not known yet.
    """

    owner: int | None
    size_bytes: int
    requested_at: float
    grant: asyncio.Future[None]
    is_submission: bool = False
    """Whether the body has arrived, and the submission has not ended."""


_BURST_SHARE = 4
_RELEASE_SECONDS = 5
"""This time after less than this part of the memory is in use again, what was freed is returned to the system."""


class UploadMemory:
    """Memory that uploads share. Each is granted all that it needs at once, so that none waits while it holds a part.

    Uploads are served in order, but those beyond the share of their tenant let those of others pass. Callers that are
    not known yet share `unknown_bytes` beside the `total_bytes` of tenants. None is granted to tenants while
    `max_submissions` are under way, and those that have the part `share` of them come last. Slow clients don't count.

    While an upload has waited for `queue_seconds`, further ones of its tenant are refused, and so they are once
    `max_waiting` wait, or the part `share` of them for one tenant. A burst is served, but a load that is too high does
    not make all uploads late, however fast they are served.
    """

    def __init__(
        self,
        total_bytes: int,
        *,
        share_bytes: int,
        unknown_bytes: int,
        wait_seconds: float,
        max_submissions: int = 64,
        max_waiting: int = 256,
        share: float = 1,
        queue_seconds: float = 1.0,
    ) -> None:
        self._total_bytes = total_bytes
        self._reserved_bytes = 0  # by tenants
        self._share_bytes = min(share_bytes, total_bytes)
        self._unknown_bytes = unknown_bytes
        self._wait_seconds = wait_seconds
        self._max_submissions = max_submissions
        self._share_submissions = max(int(max_submissions * share), 1)
        self._max_waiting = max_waiting
        self._share_waiting = max(int(max_waiting * share), 1)
        self._queue_seconds = queue_seconds
        self._held: Counter[int | None] = Counter()
        self._submissions: Counter[int | None] = Counter()
        self._waiting: dict[Allocation, None] = {}
        self._waiting_count: Counter[int | None] = Counter()
        self._burst_bytes = total_bytes // _BURST_SHARE
        self._release_timer: asyncio.TimerHandle | None = None

    @property
    def limit_bytes(self) -> Mapping[tuple[str, ...], float]:
        """The limits of the two pools, by their labels."""
        return {_TENANTS: self._total_bytes, _UNKNOWN: self._unknown_bytes}

    @property
    def reserved_bytes(self) -> Mapping[tuple[str, ...], float]:
        return {_TENANTS: self._reserved_bytes, _UNKNOWN: self._held[None]}

    def request(self, owner: int | None, size_bytes: int) -> Allocation:
        """Request memory, to be awaited with `wait`. An upload larger than its share gets all of it.

        Raises Overloaded.
        """
        self.check_queue(owner)
        loop = asyncio.get_running_loop()
        allocation = Allocation(owner, min(size_bytes, self._limit_of(owner)), loop.time(), loop.create_future())
        self._waiting[allocation] = None
        self._waiting_count[owner] += 1
        self._grant_waiting()
        return allocation

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    def check_queue(self, owner: int | None) -> None:
        """Raise Overloaded if no further upload of an owner may wait. One at least may, whatever others do."""
        oldest = next((allocation for allocation in self._waiting if allocation.owner == owner), None)
        if oldest and (
            asyncio.get_running_loop().time() - oldest.requested_at > self._queue_seconds
            or self._waiting_count[owner] >= self._share_waiting
            or len(self._waiting) >= self._max_waiting
        ):
            raise self._overloaded()

    async def wait(self, allocation: Allocation) -> None:
        """Wait until the memory is granted. Raises Overloaded if it does not come free in time."""
        if allocation.grant.done():
            return
        try:
            async with asyncio.timeout(self._wait_seconds):
                await allocation.grant
        except TimeoutError:
            raise self._overloaded() from None

    def shrink(self, allocation: Allocation, size_bytes: int) -> None:
        """Release what exceeds `size_bytes` of a body that has arrived; a request that was not granted is withdrawn."""
        if allocation in self._waiting:
            self._leave_queue(allocation)
        else:
            released = max(allocation.size_bytes - size_bytes, 0)
            allocation.size_bytes -= released
            self._hold(allocation.owner, -released)
            is_submission = size_bytes > 0
            _count(self._submissions, allocation.owner, is_submission - allocation.is_submission)
            allocation.is_submission = is_submission
        self._grant_waiting()

    def _overloaded(self) -> Overloaded:
        detail = "Too many uploads are in progress. Send the image again later."
        return Overloaded(detail, retry_after=self._wait_seconds)

    def _leave_queue(self, allocation: Allocation) -> None:
        del self._waiting[allocation]
        _count(self._waiting_count, allocation.owner, -1)

    def _hold(self, owner: int | None, size_bytes: int) -> None:
        _count(self._held, owner, size_bytes)
        if owner is None:
            return
        self._reserved_bytes += size_bytes
        if self._reserved_bytes <= self._burst_bytes < self._reserved_bytes - size_bytes:
            if self._release_timer:
                self._release_timer.cancel()
            loop = asyncio.get_running_loop()
            self._release_timer = loop.call_later(_RELEASE_SECONDS, release_free_memory)

    def _limit_of(self, owner: int | None) -> int:
        return self._unknown_bytes if owner is None else self._share_bytes

    def _grant_waiting(self) -> None:
        blocked: set[int | None] = set()
        is_full = False
        waiting = list(self._waiting)
        if len(self._waiting_count) > 1:
            waiting.sort(key=lambda allocation: self._submissions[allocation.owner] >= self._share_submissions)
        for allocation in waiting:
            owner, size_bytes = allocation.owner, allocation.size_bytes
            if len(blocked) == len(self._waiting_count) or (is_full and None not in self._waiting_count):
                break
            if owner in blocked or self._held[owner] + size_bytes > self._limit_of(owner):
                blocked.add(owner)
            elif owner is not None and (
                is_full
                or self._reserved_bytes + size_bytes > self._total_bytes
                or self._submissions.total() >= self._max_submissions
            ):
                is_full = True  # overtaken by smaller uploads, a large one could wait for ever
            else:
                self._leave_queue(allocation)
                self._hold(owner, size_bytes)
                if not allocation.grant.done():
                    allocation.grant.set_result(None)


def _count(counter: Counter[int | None], owner: int | None, change: int) -> None:
    counter[owner] += change
    if not counter[owner]:
        del counter[owner]
