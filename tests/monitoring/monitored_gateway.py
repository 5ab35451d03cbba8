"""The monitored system: two gateways that share a store and an upstream, and a webhook receiver."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from service.domain.tasks import Kind
from tests.process.gateway import TIMEOUT_SECONDS, GatewayProcess, start_gateway, wait_until
from tests.process.sandbox import ADMIN_TOKEN, SandboxProcess, advance_clock, run_sandbox
from tests.support.images import make_png
from tests.support.network import reserve_port
from tests.support.valkey import Valkey
from tests.support.valkey import run_valkey as store_running

UNAVAILABLE_STATUSES = 502, 503
"""The statuses of an artifact that cannot be fetched."""


class _WebhookReceiver(BaseHTTPRequestHandler):
    """Responds with the status in the path."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(int(self.path.removeprefix("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Suppress the request log."""


@dataclass(frozen=True)
class MonitoredGateway:
    """The processes and their clients. `api` takes requests, `worker` checks tasks and sends webhooks.

    Nothing listens at `unreachable_url`.
    """

    api: GatewayProcess
    worker: GatewayProcess
    upstream: SandboxProcess
    store: Valkey
    prefix: str
    receiver_url: str
    unreachable_url: str
    http: httpx2.Client
    tokens: dict[str, str] = field(default_factory=dict)
    restarted_stores: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        """Return the addresses of both operators' ports."""
        return [f"127.0.0.1:{item.environ['GATEWAY_OPS_PORT']}" for item in (self.api, self.worker)]

    def scrape_all(self) -> list[str]:
        """Scrape both processes."""
        return [self.http.get(f"http://{target}/metrics").raise_for_status().text for target in self.targets]

    def sum_samples(self, name: str, **labels: str) -> float:
        """Sum the samples of a metric with these labels over both processes."""
        families = (family for scrape in self.scrape_all() for family in text_string_to_metric_families(scrape))
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def call_admin(self, method: str, path: str, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        answer = self.http.request(method, f"{self.api.ops_url}/admin/v1{path}", headers=headers, **more)
        assert answer.is_success, answer.text
        return answer.json()

    def create_account(self, name: str, count: int, money: int, **policy: Any) -> None:
        """Create an account at the upstream and in the registry; a task costs at most three yuan."""
        self.set_balance(name, count, money)
        prices = dict.fromkeys(Kind, 3)
        self.call_admin("PUT", f"/accounts/{name}", json={"user_key": name, "max_price": prices} | policy)

    def set_balance(self, name: str, count: int, money: int) -> None:
        body = {"count": count, "money": money}
        self.http.put(f"{self.upstream.url}/_control/accounts/{name}", json=body).raise_for_status()

    def create_tenant(self, name: str, *accounts: str, **policy: Any) -> None:
        """Create a tenant on some accounts, with a token."""
        self.call_admin("PUT", f"/tenants/{name}", json={"accounts": accounts} | policy)
        self.tokens[name] = self.call_admin("POST", f"/tenants/{name}/tokens")["token"]

    def call(self, tenant: str, method: str, path: str, **more: Any) -> httpx2.Response:
        """Call the tenants' port as a tenant, or with an unknown token."""
        headers = {"Authorization": f"Bearer {self.tokens.get(tenant, 'unknown')}"} | dict(more.pop("headers", {}))
        return self.http.request(method, self.api.url + path, headers=headers, **more)

    def submit(
        self, tenant: str, kind: str = "face-enhance", headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        files = {"image": ("a.png", make_png(), "image/png")}
        return self.call(tenant, "POST", f"/v1/tasks/{kind}", files=files, headers=headers or {})

    def submit_accepted(self, tenant: str, kind: str = "face-enhance") -> str:
        """Submit; returns the path of the task."""
        answer = self.submit(tenant, kind)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["links"]["self"])

    def start_task(self, tenant: str, *, seconds: float = 60) -> str:
        """Start a task that takes so long, as all following ones do; returns its path."""
        self.upstream.set_faults(seconds=seconds)
        return self.submit_accepted(tenant)

    def run_task(self, tenant: str, kind: str = "face-enhance") -> dict[str, Any]:
        """Run a task to its end, waiting with `Prefer: wait`."""
        path, result = self.submit_accepted(tenant, kind), {}

        def has_ended() -> bool:
            result.update(self.call(tenant, "GET", path, headers={"Prefer": "wait=5"}).json())
            return result.get("state") in {"succeeded", "failed"}

        wait_until(has_ended, "the end of a task")
        return result

    def advance_clock(self, seconds: float) -> None:
        """Advance the ledger's clock, which stands still from then on."""
        advance_clock(self.store, self.prefix, seconds)

    @contextmanager
    def stop_store(self) -> Iterator[None]:
        """Kill the store, and restart it with its data."""
        command = self.store.process.args
        self.store.kill()
        try:
            yield
        finally:
            self.restarted_stores.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))


@contextmanager
def run_monitored_gateway(folder: Path) -> Iterator[MonitoredGateway]:
    """Start all processes."""
    with ExitStack() as opened:
        store = opened.enter_context(store_running("--appendonly", "yes", "--appendfsync", "always"))
        upstream = opened.enter_context(run_sandbox())
        shared = upstream.gateway_settings(store)
        api = opened.enter_context(start_gateway(folder / "api", GATEWAY_ROLE="api", **shared))
        worker = opened.enter_context(start_gateway(folder / "worker", GATEWAY_ROLE="worker", **shared))
        server = ThreadingHTTPServer(("127.0.0.1", 0), _WebhookReceiver)
        receiving = Thread(target=server.serve_forever)
        receiving.start()
        gateway = MonitoredGateway(
            api=api,
            worker=worker,
            upstream=upstream,
            store=store,
            prefix=shared["GATEWAY_KEY_PREFIX"],
            receiver_url=f"http://127.0.0.1:{server.server_port}",
            unreachable_url=f"http://127.0.0.1:{reserve_port()}",
            http=opened.enter_context(httpx2.Client(timeout=TIMEOUT_SECONDS, trust_env=False)),
        )
        try:
            api.wait_ready()
            worker.wait_ready()
            yield gateway
        finally:
            server.shutdown()
            receiving.join()
            server.server_close()
            for process in gateway.restarted_stores:
                opened.callback(process.wait)
                opened.callback(process.kill)
