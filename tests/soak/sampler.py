"""Samples of the processes and the store: memory, descriptors, keys, sorted sets."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

_MB = 1e6
_BATCH = 1_000


@dataclass(frozen=True)
class Sample:
    """The state of a process, of the store, and of the requests since the previous sample, at a time in seconds."""

    at: float
    memory_mb: Mapping[str, float]
    """Resident memory of each process, by its name."""
    descriptors: Mapping[str, int]
    store_mb: float
    """What the store uses for data."""
    tasks: int
    """Tasks accepted since the start."""
    latency_ms: Mapping[str, Sequence[float]]
    """Of each action, the latencies since the previous sample."""


@dataclass(frozen=True)
class KeyCount:
    """The keys of the store at a time in seconds, by their pattern: ids are replaced."""

    at: float
    tasks: int
    with_ttl: Mapping[str, int]
    without_ttl: Mapping[str, int]
    sorted_sets: Mapping[str, int]
    """Members of all sorted sets of a pattern."""


@dataclass
class Sampler:
    """Collects samples; `processes` has the ids by name."""

    processes: Mapping[str, int]
    store: Redis
    started_at: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)
    key_counts: list[KeyCount] = field(default_factory=list)

    def take(self, tasks: int, latencies: Mapping[str, Sequence[float]]) -> None:
        info: Any = self.store.info("memory")
        self.samples.append(
            Sample(
                time.monotonic() - self.started_at,
                {name: _read_memory_mb(pid) for name, pid in self.processes.items()},
                {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in self.processes.items()},  # noqa: PTH208
                info["used_memory"] / _MB,
                tasks,
                latencies,
            )
        )

    def count_keys(self, tasks: int) -> None:
        """Count all keys, which takes the store some milliseconds for each thousand."""
        with_ttl, without_ttl, members = Counter[str](), Counter[str](), Counter[str]()
        keys = list(self.store.scan_iter(count=_BATCH))
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            pipeline = self.store.pipeline(transaction=False)
            for key in batch:
                pipeline.pttl(key)
            for key, ttl in zip(batch, pipeline.execute(), strict=True):
                if ttl != _GONE:
                    (without_ttl if ttl == _ENDLESS else with_ttl)[find_pattern(key)] += 1
        for key in self.store.scan_iter(count=_BATCH, _type="zset"):
            members[find_pattern(key)] += self.store.zcard(key)
        self.key_counts.append(KeyCount(time.monotonic() - self.started_at, tasks, with_ttl, without_ttl, members))


_GONE, _ENDLESS = -2, -1
"""Answers of PTTL for a key that does not exist, and for one without a time to live."""


def find_pattern(key: bytes) -> str:
    """Return a key without its prefix, its ids replaced by `*`."""
    _, *parts = key.decode().split(":")
    return ":".join(part if part.isalpha() else "*" for part in parts)


def _read_memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib) * 1024 / _MB
