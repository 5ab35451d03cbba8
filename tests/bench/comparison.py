"""A run of the comparison: pinned CPUs, the servers to compare with a store, a vendor and a tenant, and the results."""

from __future__ import annotations

import base64
import math
import os
import resource
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Self

import click
import httpx2
from redis import Redis

from tests.bench.load import Request, closed_loop
from tests.bench.peers.servers import USER_KEY, Server, fastapi_gateway, nginx_lua, serving, vendor_stub
from tests.process.gateway import HTTP, wait_until
from tests.support.network import reserve_port
from tests.support.valkey import run_valkey

HERE = Path(__file__).parents[2]
API, ALL = "api", "all"
LUA, FASTAPI = "nginx+Lua", "FastAPI"
REFERENCES = (LUA, FASTAPI)
OTHER = "other"
"""The label of the other checkout."""
ALONE = "alone"
"""The rate of the same requests without what goes on beside them."""
_UNLIMITED = 10**9
TENANT = {
    "accounts": ["main"],
    "limits": [{"window": "day", "tasks": _UNLIMITED}, {"window": "month", "tasks": _UNLIMITED}],
    "max_active": _UNLIMITED,
}
_FILES = 16_384


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

    def open_admin(self, ops_url: str) -> httpx2.Client:
        """Return a client of the operators' API."""
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        return httpx2.Client(base_url=f"{ops_url}/admin/v1", headers=headers, timeout=30, trust_env=False)


@dataclass(frozen=True)
class Candidate:
    """A server to measure: one of the references, or the gateway of a checkout in a role."""

    kind: str
    checkout: Path | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.label})" if self.label else self.kind

    def start(self, env: Environment) -> AbstractContextManager[Server]:
        """Run it until the context ends."""
        if self.checkout:
            return self._run_gateway(env, env.server_cpu)
        return (nginx_lua if self.kind == LUA else fastapi_gateway)(env.stub, env.redis_url, env.server_cpu)

    def start_reader(self, env: Environment) -> AbstractContextManager[Server]:
        """Run a gateway in role `api` on the same store, but on the CPU of the load, to create and read tasks."""
        return replace(self, kind=API)._run_gateway(env, env.load_cpu)

    @contextmanager
    def _run_gateway(self, env: Environment, cpu: int) -> Iterator[Server]:
        with self._run_process(env, cpu) as process:
            env.token = env.token or _make_tenant(env, process.ops_url)
            server = replace(process, token=env.token)
            _wait_for_token(server)
            yield server

    def _run_process(self, env: Environment, cpu: int) -> AbstractContextManager[Server]:
        port, ops_port = reserve_port(), reserve_port()
        settings = {
            "GATEWAY_ENV": "production",
            "GATEWAY_ROLE": self.kind,
            "GATEWAY_PORT": str(port),
            "GATEWAY_OPS_PORT": str(ops_port),
            "GATEWAY_REDIS_URL": env.redis_url,
            "GATEWAY_UPSTREAM_URL": env.stub.url,
            "GATEWAY_UPSTREAM_CLEARTEXT": "allow",
            "GATEWAY_SECRET_KEYS": env.secret_key,
            "GATEWAY_ADMIN_TOKEN": env.admin_token,
        }
        if self.checkout and "tenant_share" in (self.checkout / "service/settings.py").read_text():
            # One tenant and one token send all requests. An older checkout refuses settings that it does not know.
            settings |= {"GATEWAY_TENANT_SHARE": "1", "GATEWAY_READS_PER_SECOND": "0"}
        environ = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        environ |= settings | env.settings
        command = ["env", "-C", str(self.checkout), f"{self.checkout}/.venv/bin/python", "-m", "service", "serve"]
        ops_url = f"http://127.0.0.1:{ops_port}"
        return serving(self.name, command, cpu=cpu, port=port, ops_url=ops_url, environ=environ)


def _make_tenant(env: Environment, ops_url: str) -> str:
    """Create an account, and a tenant with limits that are counted but never reached; returns its token."""
    with env.open_admin(ops_url) as http:
        http.put("/accounts/main", json={"user_key": USER_KEY}).raise_for_status()
        http.put("/tenants/shop", json=TENANT).raise_for_status()
        return str(http.post("/tenants/shop/tokens", json={}).raise_for_status().json()["token"])


def _wait_for_token(server: Server) -> None:
    headers, url = dict([server.authorization]), f"{server.url}/v1/quota"
    wait_until(lambda: HTTP.get(url, headers=headers).status_code == 200, "the use of the tenant's token")


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

    against: Path | None
    rounds: int
    seconds: int
    quick: bool
    store_preload: str = ""
    """A library that the store loads first."""
    server_cpu: int = 0
    load_cpu: int = 0
    title: str = ""
    """The description of the current workload."""
    titles: dict[str, str] = field(default_factory=dict)
    """Descriptions by row."""
    seeded: dict[str, tuple[Environment, list[str]]] = field(default_factory=dict)
    """Stores with many running tasks and their ids, shared by several workloads and by all roles of a checkout."""
    stack: ExitStack = field(default_factory=ExitStack)
    """Ends with the run."""
    _runs: dict[tuple[str, str, int], list[tuple[dict[str, float], Counter[str]]]] = field(default_factory=dict)

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
        self.stack.close()

    def candidates(self, *roles: str, beside: Sequence[str] = ()) -> list[Candidate]:
        """Return the gateway in these roles, that of the other checkout if there is one, and references."""
        gateways = [Candidate(role, HERE) for role in roles]
        gateways += [Candidate(role, self.against, OTHER) for role in roles if self.against]
        return gateways + [Candidate(kind) for kind in beside]

    @contextmanager
    def environment(self, **stub: Any) -> Iterator[Environment]:
        """Open a vendor and an empty durable store for one server, both on the CPU of the load."""
        with self._open_store() as url, vendor_stub(self.load_cpu, **stub) as vendor:
            yield Environment(self.server_cpu, self.load_cpu, vendor, url)

    @contextmanager
    def _open_store(self) -> Iterator[str]:
        with run_valkey("--appendonly", "yes", preload=self.store_preload) as store:
            for thread in Path(f"/proc/{store.process.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {self.load_cpu})
            yield store.url

    @contextmanager
    def copy(self, env: Environment) -> Iterator[Environment]:
        """Open a copy of a store, with the same vendor."""
        with self._open_store() as url, Redis.from_url(env.redis_url) as source, Redis.from_url(url) as target:
            keys = source.keys()
            reading, writing = source.pipeline(transaction=False), target.pipeline(transaction=False)
            for key in keys:
                reading.dump(key).pttl(key)
            values = reading.execute()
            for key, value, expiry in zip(keys, values[::2], values[1::2], strict=True):
                writing.restore(key, max(expiry, 0), value)
            writing.execute()
            yield replace(env, redis_url=url)

    @contextmanager
    def run(self, candidate: Candidate, settings: Mapping[str, str] | None = None, **stub: Any) -> Iterator[Server]:
        """Run a server with an empty store and a vendor of its own; `settings` are additional ones of the gateway."""
        with self.environment(**stub) as env:
            env.settings |= settings or {}
            with candidate.start(env) as server:
                yield server

    def add(
        self, row: str, server: str, figures: dict[str, float], errors: Counter[str], *, connections: int = 0
    ) -> None:
        """Record the figures of a server in a workload, and print them."""
        self.titles[row] = self.title
        self._runs.setdefault((row, server, connections), []).append((figures, errors))
        text = "  ".join(f"{name} {value:,.5g}" for name, value in figures.items())
        at = f" at {connections}" if connections else ""
        failed = f"  ERRORS {dict(errors)}" if errors else ""
        click.echo(f"  {time.strftime('%H:%M:%S')} {row:<18} {server + at:<24} {text}{failed}", file=sys.stderr)

    def measure(
        self,
        row: str,
        candidate: Candidate,
        server: Server,
        request: Request,
        *,
        connections: int = 16,
        seconds: int,
        alone_per_second: float = 0,
    ) -> None:
        """Load a server in a closed loop and record the figures, with the ratio to a rate without others if given."""
        server.reset_peak()
        used = server.cpu_seconds()
        load = closed_loop(server.url, request, connections=connections, seconds=seconds)
        used = server.cpu_seconds() - used
        figures = {
            "per_second": load.per_second,
            "p50_ms": load.p50_ms,
            "p99_ms": load.p99_ms,
            "cpu_ms": used * 1000 / load.succeeded if load.succeeded else math.nan,
            "peak_mb": server.peak_mb(),
        }
        if alone_per_second:
            figures[f"x {ALONE}"] = load.per_second / alone_per_second
        self.add(row, candidate.name, figures, load.errors, connections=connections)

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
