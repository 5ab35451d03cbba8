"""All that is looked at: two gateways that share a store and an upstream, and a receiver of webhooks."""

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
from tests.support.valkey import Valkey, find_free_port
from tests.support.valkey import run_valkey as store_running

UNAVAILABLE_STATUSES = 502, 503
"""What a result that can't be had is answered with."""


class _WebhookReceiver(BaseHTTPRequestHandler):
    """Answers with the status that the path says."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(int(self.path.removeprefix("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class MonitoredGateway:
    """What runs, and how it is asked. `api` takes requests, `worker` follows tasks and tells of their ends.

    At `nowhere` there is no upstream.
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
        """Where both are asked for their metrics."""
        return [f"127.0.0.1:{each.environ['GATEWAY_OPS_PORT']}" for each in (self.api, self.worker)]

    def scrape_all(self) -> list[str]:
        """The metrics of both, read at the same moment or nearly so."""
        return [self.http.get(f"http://{each}/metrics").raise_for_status().text for each in self.targets]

    def sum_samples(self, name: str, **labels: str) -> float:
        """What both have of something, under these labels, together."""
        families = (family for scrape in self.scrape_all() for family in text_string_to_metric_families(scrape))
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def call_admin(self, method: str, path: str, **more: Any) -> Any:
        """Call the operators' port of the one that takes requests."""
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        answer = self.http.request(method, f"{self.api.ops_url}/admin/v1{path}", headers=headers, **more)
        assert answer.is_success, answer.text
        return answer.json()

    def create_account(self, name: str, count: int, money: int, **policy: Any) -> None:
        """An account at the upstream with so many uses and yuan, of which a task costs three at the most."""
        self.set_balance(name, count, money)
        prices = dict.fromkeys(Kind, 3)
        self.call_admin("PUT", f"/accounts/{name}", json={"user_key": name, "max_price": prices} | policy)

    def set_balance(self, name: str, count: int, money: int) -> None:
        """Have an account hold so much at the upstream."""
        body = {"count": count, "money": money}
        self.http.put(f"{self.upstream.url}/_control/accounts/{name}", json=body).raise_for_status()

    def create_tenant(self, name: str, *accounts: str, **policy: Any) -> None:
        """A tenant on some accounts, with a token."""
        self.call_admin("PUT", f"/tenants/{name}", json={"accounts": accounts} | policy)
        self.tokens[name] = self.call_admin("POST", f"/tenants/{name}/tokens")["token"]

    def call(self, tenant: str, method: str, path: str, **more: Any) -> httpx2.Response:
        """Call the tenants' port as a tenant; as nobody if there is no such tenant."""
        headers = {"Authorization": f"Bearer {self.tokens.get(tenant, 'nobody')}"} | dict(more.pop("headers", {}))
        return self.http.request(method, self.api.url + path, headers=headers, **more)

    def submit(
        self, tenant: str, kind: str = "face-enhance", headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        """Submit a small picture."""
        files = {"image": ("a.png", make_png(), "image/png")}
        return self.call(tenant, "POST", f"/v1/tasks/{kind}", files=files, headers=headers or {})

    def submit_accepted(self, tenant: str, kind: str = "face-enhance") -> str:
        """Where a submission is read that became a task."""
        answer = self.submit(tenant, kind)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["links"]["self"])

    def start_task(self, tenant: str, *, seconds: float = 60) -> str:
        """Where a task is read that takes so long, as all do from now on."""
        self.upstream.set_faults(seconds=seconds)
        return self.submit_accepted(tenant)

    def run_task(self, tenant: str, kind: str = "face-enhance") -> dict[str, Any]:
        """A task that was submitted and has come to its end, for which its tenant waited."""
        path, found = self.submit_accepted(tenant, kind), {}

        def has_ended() -> bool:
            found.update(self.call(tenant, "GET", path, headers={"Prefer": "wait=5"}).json())
            return found.get("state") in {"succeeded", "failed"}

        wait_until(has_ended, "the end of a task")
        return found

    def advance_clock(self, seconds: float) -> None:
        """Let time pass for the ledger, whose clock stands still from then on."""
        advance_clock(self.store, self.prefix, seconds)

    @contextmanager
    def stop_store(self) -> Iterator[None]:
        """Kill the store, and start it again on its data."""
        command = self.store.process.args
        self.store.kill()
        try:
            yield
        finally:
            self.restarted_stores.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))


@contextmanager
def run_monitored_gateway(folder: Path) -> Iterator[MonitoredGateway]:
    """Start everything."""
    with ExitStack() as opened:
        store = opened.enter_context(store_running("--appendonly", "yes", "--appendfsync", "always"))
        upstream = opened.enter_context(run_sandbox())
        shared = upstream.gateway_settings(store)
        api = opened.enter_context(start_gateway(folder / "api", GATEWAY_ROLE="api", **shared))
        worker = opened.enter_context(start_gateway(folder / "worker", GATEWAY_ROLE="worker", **shared))
        server = ThreadingHTTPServer(("127.0.0.1", 0), _WebhookReceiver)
        receiving = Thread(target=server.serve_forever)
        receiving.start()
        plant = MonitoredGateway(
            api=api,
            worker=worker,
            upstream=upstream,
            store=store,
            prefix=shared["GATEWAY_KEY_PREFIX"],
            receiver_url=f"http://127.0.0.1:{server.server_port}",
            unreachable_url=f"http://127.0.0.1:{find_free_port()}",
            http=opened.enter_context(httpx2.Client(timeout=TIMEOUT_SECONDS, trust_env=False)),
        )
        try:
            api.wait_ready()
            worker.wait_ready()
            yield plant
        finally:
            server.shutdown()
            receiving.join()
            server.server_close()
            for process in plant.restarted_stores:
                opened.callback(process.wait)
                opened.callback(process.kill)
