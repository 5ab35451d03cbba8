"""The monitored system, two gateways that share a store and an upstream, and a workload with every kind of event.

Each event happens only as often as its metrics need.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from service.clients.http import BREAKER_THRESHOLD
from service.domain.tasks import Kind
from service.domain.webhooks import RETRY_SECONDS
from tests.process.gateway import TIMEOUT_SECONDS, GatewayProcess, start_gateway, wait_until
from tests.process.sandbox import ADMIN_TOKEN, SandboxProcess, advance_clock, run_sandbox
from tests.support.images import make_png
from tests.support.network import reserve_port
from tests.support.valkey import Valkey, run_valkey

UNAVAILABLE_STATUSES = 502, 503
"""The statuses of an artifact that cannot be fetched."""
LEASE_SECONDS = 180
WINDOWS = ("minute", "hour", "day", "month", "total")
DENYING_POLICIES: Mapping[str, Mapping[str, Any]] = {
    **{f"{window}-tasks": {"limits": [{"window": window, "tasks": 1}]} for window in WINDOWS},
    **{f"{window}-money": {"limits": [{"window": window, "money": 3}]} for window in WINDOWS},
    "max-active": {"max_active": 1},
    "balance": {},
}
"""A tenant for each reason to deny, of the same name; one task at the highest price uses up its limit."""
RECEIVER_STATUSES = {"accepting": 204, "busy": 500, "gone": 410}
"""Tenants, with the status that their webhook receivers return."""
CHECK_FAULTS: Mapping[str, Mapping[str, Any]] = {
    "no_response": {"reply": "page", "status": 502},
    "not_found": {"wrong": {"status": "null"}},
    "invalid": {"wrong": {"images_url": "missing", "vector_url": "missing", "grid_url": "missing"}},
}
"""Faults in checks of tasks, by the resulting outcome."""
FILE_FAULTS: Sequence[Mapping[str, Any]] = (
    {"reply": "page", "status": 404},
    {"reply": "page", "status": 500},
    {"reply": "cut"},
)
"""Faults in artifacts."""
_ACCOUNT = {"max-active": "main", "balance": "empty"}


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
        lines = [line for scrape in self.scrape_all() for line in scrape.splitlines() if line.startswith(name)]
        families = text_string_to_metric_families("\n".join(lines) + "\n")
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def count_webhook_attempts(self) -> int:
        return self.worker.log_path.read_text().count("webhook.attempted")

    def has_more_attempts(self, count: int) -> bool:
        return self.count_webhook_attempts() > count

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

    def run_kinds(self, tenant: str) -> list[dict[str, Any]]:
        """Run a task of each kind, one at a time, so that each cost can be observed."""
        return [self.run_task(tenant, kind) for kind in Kind]

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
        store = opened.enter_context(run_valkey("--appendonly", "yes", "--appendfsync", "always"))
        upstream = opened.enter_context(run_sandbox())
        shared = upstream.gateway_settings(store)
        api = opened.enter_context(start_gateway(folder / "api", GATEWAY_ROLE="api", **shared))
        worker = opened.enter_context(start_gateway(folder / "worker", GATEWAY_ROLE="worker", **shared))
        receiver = opened.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), _WebhookReceiver))
        receiving = Thread(target=receiver.serve_forever)
        receiving.start()
        gateway = MonitoredGateway(
            api=api,
            worker=worker,
            upstream=upstream,
            store=store,
            prefix=shared["GATEWAY_KEY_PREFIX"],
            receiver_url=f"http://127.0.0.1:{receiver.server_port}",
            unreachable_url=f"http://127.0.0.1:{reserve_port()}",
            http=opened.enter_context(httpx2.Client(timeout=TIMEOUT_SECONDS, trust_env=False)),
        )
        try:
            api.wait_ready()
            worker.wait_ready()
            yield gateway
        finally:
            receiver.shutdown()
            receiving.join()
            for process in gateway.restarted_stores:
                opened.callback(process.wait)
                opened.callback(process.kill)


def create_tenants(gateway: MonitoredGateway) -> None:
    """Create all accounts and tenants, and wait until the gateway has them."""
    gateway.create_account("main", 1_000, 1_000, floor_count=5, floor_money=10)
    gateway.create_account("money", 0, 1_000)
    gateway.create_account("leaky", 20, 50)
    gateway.create_account("empty", 0, 0)
    gateway.create_account("unknown", 5, 5)
    gateway.create_account("blind", 5, 5, max_price={})
    gateway.create_account("away", 5, 5, base_url=gateway.unreachable_url)
    gateway.create_tenant("steady", "main", limits=[{"window": item, "tasks": 500, "money": 500} for item in WINDOWS])
    for name in ("money", "leaky", "unknown", "blind", "away"):
        gateway.create_tenant(name, name)
    gateway.create_tenant("two-accounts", "unknown", "main")
    for name, policy in DENYING_POLICIES.items():
        gateway.create_tenant(name, _ACCOUNT.get(name, "money"), **policy)
    for name, status in RECEIVER_STATUSES.items():
        hook = {"url": f"{gateway.receiver_url}/{status}", "allow": ["127.0.0.0/8"]}
        gateway.create_tenant(name, "main", webhook=hook)
    wait_until(lambda: gateway.call(name, "GET", "/v1/quota").status_code == 200, "the update of the registry")


def run_tasks(gateway: MonitoredGateway) -> None:
    """Run every kind of task to its end, followed in every way."""
    with ThreadPoolExecutor() as threads:
        (task, *_), _ = threads.map(gateway.run_kinds, ("steady", "money"))
    for path in ("", "?limit=5", f"/{task['id']}", f"/{task['id']}/artifacts/image"):
        assert gateway.call("steady", "GET", f"/v1/tasks{path}").status_code == 200, path
    for path in ("/v1/usage", "/v1/quota"):
        assert gateway.call("steady", "GET", path).status_code == 200
    for kind in ("task", "vector_task", "face_enhance_task", "seamless_task"):
        form = {"user_key": gateway.tokens["steady"]}, {"input_image": ("a.png", make_png(), "image/png")}
        old = gateway.http.post(f"{gateway.api.url}/api/submit_{kind}", data=form[0], files=form[1]).json()
        check = {"user_key": gateway.tokens["steady"], "task_id": old["task_id"]}
        assert gateway.http.post(f"{gateway.api.url}/api/check_task_status", data=check).json()["err_code"] == 0
    refund = gateway.call_admin("POST", "/refunds", json={"task": task["id"], "reason": "It came out blank."})
    assert refund["refund"]
    key = {"Idempotency-Key": '"once-and-no-more-than-once"'}
    ids = {gateway.submit("steady", headers=key).json()["id"] for _ in range(2)}
    assert len(ids) == 1
    with ThreadPoolExecutor() as threads:
        running = gateway.start_task("steady", seconds=1.5)
        followed = threads.submit(gateway.call, "steady", "GET", f"{running}/events")
        waited = threads.submit(gateway.call, "steady", "GET", running, headers={"Prefer": "wait=10"})
        assert waited.result().json()["state"] == "succeeded"
        assert "succeeded" in followed.result().text
    gateway.upstream.set_faults()


def send_refused(gateway: MonitoredGateway) -> None:
    """Send requests that are denied or invalid."""
    for name in DENYING_POLICIES:
        if name == "max-active":
            gateway.upstream.set_faults(seconds=2)
        gateway.submit(name)
        wait_until(partial(_is_denied, gateway, name), f"a refusal by {name}")
        gateway.upstream.set_faults()
    expected = {
        ("unknown-token", "GET", "/v1/quota"): 401,
        ("steady", "GET", "/v1/nothing"): 404,
        ("steady", "DELETE", "/v1/quota"): 405,
        ("steady", "POST", "/v1/tasks/upscale"): 415,
    }
    results = {item: gateway.call(*item).status_code for item in expected}
    assert results == expected, results
    assert gateway.http.get(f"{gateway.api.ops_url}/admin/v1/accounts").status_code == 401


def inject_upstream_faults(gateway: MonitoredGateway) -> None:
    """Run tasks while the vendor's submits, checks and artifacts fail."""
    _with_fault(gateway, {"on": "submit", "fail": "it could not be done"}, lambda: _expect_state(gateway, "failed"))
    _with_fault(gateway, {"on": "submit", "reject": "too dark"}, lambda: _expect_status(gateway, "steady", [502]))
    _with_fault(gateway, {"on": "submit", "reply": "reset"}, lambda: _expect_status(gateway, "steady", [504]))
    for status in (301, 429):
        refused = {"on": "submit", "reply": "page", "status": status, "when": "before"}
        _with_fault(gateway, refused, lambda: _expect_status(gateway, "steady", [503]))
    for tenant, status in (("unknown", 503), ("two-accounts", 201)):
        gateway.call_admin("POST", "/accounts/unknown/reopen")
        _with_fault(
            gateway, {"on": "submit", "refuse": "账户不存在"}, partial(_expect_status, gateway, tenant, [status])
        )
    nothing = {"remaining_count": "missing", "remaining_money": "missing"}
    _with_fault(gateway, {"times": None, "wrong": nothing}, lambda: _expect_state(gateway, "succeeded", "blind"))
    for answer, fault in CHECK_FAULTS.items():
        _with_fault(gateway, {"on": "check", "times": None, **fault}, partial(_wait_for_check, gateway, answer))
    result = f"/v1/tasks/{gateway.run_task('steady')['id']}/artifacts/image"
    for fault in FILE_FAULTS:
        _with_fault(gateway, {"on": "file", **fault}, lambda: _expect_unavailable(gateway, result))
    for _ in range(BREAKER_THRESHOLD + 1):
        _expect_status(gateway, "away", [503])


def spend_outside(gateway: MonitoredGateway) -> None:
    """Spend prepaid uses and money outside the gateway."""
    gateway.run_task("leaky")
    gateway.set_balance("leaky", 15, 50)
    gateway.run_task("leaky")
    gateway.set_balance("leaky", 14, 40)
    gateway.run_task("leaky")
    unexplained = gateway.call_admin("GET", "/accounts/leaky")["unexplained"]
    assert unexplained["count"] > 0, unexplained
    assert unexplained["money"] > 0, unexplained


def deliver_webhooks(gateway: MonitoredGateway) -> None:
    """Send webhooks to a receiver that accepts, one that fails and one that is gone."""
    for name in RECEIVER_STATUSES:
        gateway.run_task(name)


def interrupt_store(gateway: MonitoredGateway, is_noticed: Callable[[], bool]) -> None:
    """Let the store reject writes, then stop it until the metrics show that."""
    task = gateway.start_task("steady")
    with Redis(unix_socket_path=str(gateway.store.socket_path)) as client:
        client.config_set("min-replicas-to-write", 1)
        _expect_status(gateway, "steady", [503])
        client.config_set("min-replicas-to-write", 0)
    with gateway.stop_store():
        assert gateway.call("steady", "GET", task).status_code == 200
        _expect_status(gateway, "steady", [503])
        wait_until(is_noticed, "word of a store that is away")
    wait_until(lambda: gateway.call("steady", "GET", "/v1/tasks").status_code == 200, "the return of the store")
    gateway.upstream.set_faults()


def abandon_request(gateway: MonitoredGateway) -> None:
    """Disconnect a client that waits for the end of a task."""
    url, path = httpx2.URL(gateway.api.url), gateway.start_task("steady")
    request = f"GET {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {gateway.tokens['steady']}\r\n"
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(f"{request}Prefer: wait=60\r\n\r\n".encode())
        wait_until(lambda: gateway.sum_samples("gateway_waiting_clients") > 0, "a client that waits")
    wait_until(lambda: gateway.sum_samples("gateway_http_requests_total", status="499") > 0, "word that it left")
    gateway.upstream.set_faults()


def outlast_deadlines(gateway: MonitoredGateway) -> None:
    """Advance the clock until a submission has outlasted its lease, and the failing receiver its last retry."""
    before = gateway.upstream.count_requests("submit")
    gateway.upstream.set_faults({"on": "submit", "times": 1, "latency": 8, "reply": "reset"})
    with ThreadPoolExecutor() as threads:
        submitting = threads.submit(gateway.submit, "steady")
        wait_until(lambda: gateway.upstream.count_requests("submit") > before, "the submit")
        gateway.advance_clock(LEASE_SECONDS)
        wait_until(lambda: gateway.sum_samples("gateway_reservations_expired_total") > 0, "the end of a lease")
        while not gateway.sum_samples("gateway_webhook_attempts_total", state="failed"):
            attempts = gateway.count_webhook_attempts()
            gateway.advance_clock(2 * max(RETRY_SECONDS))
            wait_until(partial(gateway.has_more_attempts, attempts), "another attempt")
        failed = gateway.call_admin("GET", "/webhooks/failed")["items"]
        gateway.call_admin("POST", f"/webhooks/{failed[0]['id']}/redeliver")
        assert submitting.result().status_code == 504


def _is_denied(gateway: MonitoredGateway, tenant: str) -> bool:
    """Submit, and return whether it was denied. At the turn of a minute the limit of minutes starts again."""
    return gateway.submit(tenant).status_code in {402, 429}


def _with_fault(gateway: MonitoredGateway, fault: Mapping[str, Any], act: Callable[[], None]) -> None:
    gateway.upstream.set_faults({"times": 1, **fault})
    act()
    gateway.upstream.set_faults()


def _wait_for_check(gateway: MonitoredGateway, answer: str) -> None:
    """Run a task until a check has this outcome."""
    gateway.submit_accepted("steady")
    wait_until(
        lambda: gateway.sum_samples("gateway_poll_checks_total", outcome=answer) > 0, f"a check that is {answer}"
    )


def _expect_state(gateway: MonitoredGateway, state: str, tenant: str = "steady") -> None:
    assert gateway.run_task(tenant)["state"] == state


def _expect_status(gateway: MonitoredGateway, tenant: str, statuses: Sequence[int]) -> None:
    answer = gateway.submit(tenant)
    assert answer.status_code in statuses, answer.text


def _expect_unavailable(gateway: MonitoredGateway, path: str) -> None:
    """Require an error response or a connection that is cut."""
    with suppress(httpx2.RemoteProtocolError):
        assert gateway.call("steady", "GET", path).status_code in UNAVAILABLE_STATUSES
