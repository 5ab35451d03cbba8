"""A run of the comparison: servers, pinned CPUs, and results."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

import click

from tests.bench.candidates import HERE, Candidate, Environment, Target, describe_commit, open_environment
from tests.bench.load import Load, Request, closed_loop

_FILES = 16_384
OTHER = "other"
"""The label of the other checkout."""


@dataclass(frozen=True)
class Result:
    """The medians of a server in a workload; errors are the sum over all rounds."""

    row: str
    server: str
    connections: int
    figures: dict[str, float]
    errors: dict[str, int]


@dataclass
class Comparison:
    """The state of a run, shared by its workloads. Closed loops take `seconds` each, and run `rounds` times."""

    against: Path | None = None
    rounds: int = 3
    seconds: int = 3
    quick: bool = False
    server_cpu: int = 0
    load_cpu: int = 0
    _runs: dict[tuple[str, str, int], list[tuple[dict[str, float], Counter[str]]]] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _seeded: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise SystemExit("error: the benchmark needs two CPUs: one for the server, one for the load")
        self.load_cpu, self.server_cpu = cpus[:2]
        os.sched_setaffinity(0, {self.load_cpu})
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, most) if most > 0 else _FILES, most))
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def gateways(self, *roles: str) -> list[Candidate]:
        """Return the gateway in these roles, and that of the other checkout if there is one."""
        own = [Candidate(role, HERE) for role in roles]
        return own + [Candidate(role, self.against, OTHER) for role in roles if self.against]

    @staticmethod
    def references(*kinds: str) -> list[Candidate]:
        return [Candidate(kind) for kind in kinds]

    def environment(self, **stub: Any) -> AbstractContextManager[Environment]:
        """Open an empty store and a vendor for one server."""
        return open_environment(self.server_cpu, self.load_cpu, **stub)

    def enter(self, context: AbstractContextManager[Any]) -> Any:
        """Open a context until the end of the run."""
        return self._stack.enter_context(context)

    @property
    def seeded(self) -> dict[str, Any]:
        """Stores with many tasks by kind of server, shared by several workloads."""
        return self._seeded

    def alternate(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        """Yield the servers in turn, once per round."""
        for _ in range(self.rounds):
            yield from candidates

    def add(
        self, row: str, server: str, figures: dict[str, float], errors: Counter[str], *, connections: int = 0
    ) -> None:
        """Record the figures of a server in a workload, and print them."""
        self._runs.setdefault((row, server, connections), []).append((figures, errors))
        text = "  ".join(f"{name} {value:,.5g}" for name, value in figures.items())
        at = f" at {connections}" if connections else ""
        failed = f"  ERRORS {dict(errors)}" if errors else ""
        click.echo(f"  {time.strftime('%H:%M:%S')} {row:<18} {server + at:<24} {text}{failed}", file=sys.stderr)

    def results(self) -> list[Result]:
        """Return the medians in the order of the first measurements."""
        return [
            Result(
                row,
                server,
                connections,
                {name: median(figures[name] for figures, _ in runs) for name in runs[0][0]},
                dict(sum((errors for _, errors in runs), Counter[str]())),
            )
            for (row, server, connections), runs in self._runs.items()
        ]

    def measure(
        self, row: str, candidate: Candidate, target: Target, request: Request, *, connections: int, seconds: int
    ) -> Load:
        """Load a server in a closed loop and record the figures."""
        server = target.server
        server.reset_peak()
        used = server.cpu_seconds()
        load = closed_loop(target.url, request, connections=connections, seconds=seconds)
        used = server.cpu_seconds() - used
        figures = {
            "per_second": load.per_second,
            "p50_ms": load.p50_ms,
            "p99_ms": load.p99_ms,
            "cpu_ms": used * 1000 / load.succeeded if load.succeeded else math.nan,
            "peak_mib": server.peak_mib(),
        }
        self.add(row, candidate.name, figures, load.errors, connections=connections)
        return load


@contextmanager
def run_candidate(comparison: Comparison, candidate: Candidate, **stub: Any) -> Iterator[tuple[Environment, Target]]:
    """Run a server with an empty store and a vendor of its own."""
    with comparison.environment(**stub) as env, candidate.start(env) as target:
        yield env, target


def commit_ids(comparison: Comparison) -> dict[str, str]:
    """Return the commits compared."""
    return {"commit": describe_commit(HERE)} | (
        {OTHER: describe_commit(comparison.against)} if comparison.against else {}
    )
