"""A run of the comparison: pinned CPUs, the servers to compare with a store, a vendor and a tenant, and the results."""

from __future__ import annotations

import base64
import math
import os
import resource
import secrets
import shutil
import subprocess
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
import httpx2

from tests.bench.load import Load, Request, closed_loop, encode_form
from tests.bench.peers.servers import USER_KEY, Server, fastapi_gateway, nginx_lua, nginx_proxy, serving, vendor_stub
from tests.support.network import reserve_port
from tests.support.valkey import run_valkey

HERE = Path(__file__).parents[2]
API, ALL, API_AND_WORKER = "api", "all", "api + worker"
PROXY, LUA, FASTAPI = "nginx proxy", "nginx+Lua", "FastAPI"
REFERENCES = (PROXY, LUA, FASTAPI)
_UNLIMITED = 10**9
_TENANT = {
    "accounts": ["main"],
    "limits": [{"window": "day", "tasks": _UNLIMITED}, {"window": "month", "tasks": _UNLIMITED}],
    "max_active": _UNLIMITED,
}
_OPTIONS = {"scale": "2", "prompt": "a lighthouse at dusk, film grain", "metadata": '{"order": "2026-004217"}'}
_START_SECONDS = 30.0


@dataclass
class Environment:
    """The environment of a server under test: two CPUs, a vendor, and a store that may have a tenant already."""

    server_cpu: int
    load_cpu: int
    stub: Server
    redis_url: str
    admin_token: str = field(default_factory=lambda: secrets.token_hex(32))
    secret_key: str = field(default_factory=lambda: base64.b64encode(secrets.token_bytes(32)).decode())
    token: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    """Additional settings of the gateway."""


@contextmanager
def open_environment(server_cpu: int, load_cpu: int, **stub: Any) -> Iterator[Environment]:
    """Open a vendor and an empty durable store, both on the CPU of the load."""
    with run_valkey("--appendonly", "yes") as store, vendor_stub(load_cpu, **stub) as vendor:
        for thread in Path(f"/proc/{store.process.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {load_cpu})
        yield Environment(server_cpu, load_cpu, vendor, store.url)


@dataclass(frozen=True)
class Target:
    """A server under test, ready for requests; `ops_url` is the operators' port of a gateway."""

    server: Server
    start_seconds: float
    ops_url: str = ""
    admin_token: str = ""

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def authorization(self) -> tuple[str, str]:
        return ("Authorization", f"Bearer {self.server.token or 'none'}")  # the plain proxy checks no token

    def submit_request(self, image: bytes) -> Request:
        """Return a submission of an image with typical options."""
        return upscale_request("/v1/tasks/upscale", image, self.authorization)

    def read_request(self, *task_ids: str) -> Request:
        """Return a request that reads these tasks in turn."""
        return Request("GET", tuple(f"/v1/tasks/{task_id}" for task_id in task_ids), (self.authorization,))

    def submit(self, image: bytes) -> str:
        """Submit an image; returns the task id."""
        request = self.submit_request(image)
        answer = httpx2.post(self.url + request.paths[0], headers=dict(request.headers), content=request.body)
        body = answer.raise_for_status().json()
        return str(body.get("id") or body["task_id"])


def upscale_request(path: str, image: bytes, *headers: tuple[str, str]) -> Request:
    """Return a submission to any server."""
    content_type, body = encode_form(_OPTIONS, image)
    return Request("POST", (path,), (*headers, ("Content-Type", content_type)), body)


@dataclass(frozen=True)
class Candidate:
    """A server to measure: one of the references, or the gateway of a checkout in a role."""

    kind: str
    checkout: Path | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.label})" if self.label else self.kind

    @property
    def data_format(self) -> str:
        """Return a key shared by servers that can use each other's stores."""
        return f"gateway {self.label}" if self.checkout else self.kind

    def start(self, env: Environment) -> AbstractContextManager[Target]:
        """Run it until the context ends."""
        return _run_gateway(self, env) if self.checkout else _run_reference(self.kind, env)


@contextmanager
def _run_reference(kind: str, env: Environment) -> Iterator[Target]:
    started_at = time.monotonic()
    if kind == PROXY:
        started = nginx_proxy(env.stub, env.server_cpu)
    elif kind == LUA:
        started = nginx_lua(env.stub, env.redis_url, env.server_cpu)
    else:
        started = fastapi_gateway(env.stub, env.redis_url, env.server_cpu)
    with started as server:
        yield Target(server, time.monotonic() - started_at)


@contextmanager
def _run_gateway(candidate: Candidate, env: Environment) -> Iterator[Target]:
    with ExitStack() as stack:
        role = candidate.kind if candidate.kind != API_AND_WORKER else API
        started_at = time.monotonic()
        server, ops_url = stack.enter_context(_run_process(candidate, role, env, env.server_cpu))
        taken = time.monotonic() - started_at
        if role != "worker":
            env.token = env.token or _make_tenant(ops_url, env)
            _wait_for_token(server.url, env.token)
        if candidate.kind == API_AND_WORKER:
            stack.enter_context(_run_process(candidate, "worker", env, env.load_cpu))
        yield Target(Server(candidate.name, server.url, server.pids, env.token), taken, ops_url, env.admin_token)


@contextmanager
def run_reader_gateway(candidate: Candidate, env: Environment) -> Iterator[Target]:
    """Run a gateway in role `api` on the same store, but on the CPU of the load, to create and read tasks."""
    reader = Environment(
        env.load_cpu, env.load_cpu, env.stub, env.redis_url, env.admin_token, env.secret_key, env.token
    )
    with _run_gateway(Candidate(API, candidate.checkout, candidate.label), reader) as target:
        env.token = reader.token
        yield target


@contextmanager
def _run_process(candidate: Candidate, role: str, env: Environment, cpu: int) -> Iterator[tuple[Server, str]]:
    """Run one process of the gateway; yields it with the address of its operators' port."""
    assert candidate.checkout
    port, ops_port = reserve_port(), reserve_port()
    url, ops_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ops_port}"
    settings = {
        "GATEWAY_ENV": "production",
        "GATEWAY_ROLE": role,
        "GATEWAY_PORT": str(port),
        "GATEWAY_OPS_PORT": str(ops_port),
        "GATEWAY_REDIS_URL": env.redis_url,
        "GATEWAY_UPSTREAM_URL": env.stub.url,
        "GATEWAY_UPSTREAM_CLEARTEXT": "allow",
        "GATEWAY_SECRET_KEYS": env.secret_key,
        "GATEWAY_ADMIN_TOKEN": env.admin_token,
    }
    own = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    python = candidate.checkout / ".venv" / "bin" / "python"
    command = ["env", "-C", str(candidate.checkout), str(python), "-m", "service", "serve"]
    ready = f"{ops_url}/readyz"
    address = ops_url if role == "worker" else url
    with serving(
        candidate.name, command, cpu=cpu, url=address, ready_url=ready, environ=own | settings | env.settings
    ) as server:
        yield server, ops_url


def _make_tenant(ops_url: str, env: Environment) -> str:
    """Create an account, and a tenant with limits that are counted but never reached; returns its token."""
    headers = {"Authorization": f"Bearer {env.admin_token}"}
    with httpx2.Client(base_url=f"{ops_url}/admin/v1", headers=headers, trust_env=False) as http:
        http.put("/accounts/main", json={"user_key": USER_KEY}).raise_for_status()
        http.put("/tenants/shop", json=_TENANT).raise_for_status()
        return str(http.post("/tenants/shop/tokens", json={}).raise_for_status().json()["token"])


def _wait_for_token(url: str, token: str) -> None:
    until = time.monotonic() + _START_SECONDS
    headers = {"Authorization": f"Bearer {token}"}
    while httpx2.get(f"{url}/v1/quota", headers=headers, trust_env=False).status_code != 200:
        if time.monotonic() > until:
            raise RuntimeError("the gateway does not take the token of its tenant")
        time.sleep(0.05)


def describe_commit(checkout: Path) -> str:
    """Return the commit of a checkout, marked if files differ from it."""
    head = _git(checkout, "rev-parse", "--short=12", "HEAD")
    results = ":(exclude)tests/bench/results"  # written by the previous run
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no", "--", ".", results)
    return head + (" with changes" if changed else "")


def _git(checkout: Path, *words: str) -> str:
    command = [shutil.which("git") or "git", "-C", str(checkout), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


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
    seeded: dict[str, Any] = field(default_factory=dict)
    """Stores with many tasks by kind of server, shared by several workloads."""
    _runs: dict[tuple[str, str, int], list[tuple[dict[str, float], Counter[str]]]] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

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
