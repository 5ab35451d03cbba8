"""The monitored system, two gateways that share a store and an upstream, and a workload with every kind of event.

Each event happens only as often as its metrics need.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from service.clients.breaker import BREAKER_THRESHOLD
from service.domain.tasks import Kind
from service.domain.webhooks import RETRY_SECONDS
from tests.process.gateway import HTTP, GatewayProcess, start_gateway, wait_until
from tests.process.sandbox import ADMIN_TOKEN, SandboxProcess, advance_clock, run_sandbox
from tests.support.images import make_png
from tests.support.network import reserve_port
from tests.support.valkey import Valkey, run_valkey

LEASE_SECONDS = 180
CHECK_FAULTS: Mapping[str, Mapping[str, Any]] = {
    "no_response": {"reply": "page", "status": 502},
    "not_found": {"wrong": {"status": "null"}},
    "invalid": {"wrong": {"images_url": "missing", "vector_url": "missing", "grid_url": "missing"}},
}
"""Faults in checks of tasks, by the resulting outcome."""
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
_ACCOUNT = {"max-active": "main", "balance": "empty"}


class _CallerServer(BaseHTTPRequestHandler):
    """A server of callers: of images by the name in the path, and of webhooks, with the status there."""

    def do_GET(self) -> None:
        if self.path == "/silent":
            self.rfile.read(1)  # until the gateway disconnects
            return
        statuses = {"/image": 200, "/text": 200, "/torn": 200, "/moved": 302}
        content = make_png() if self.path == "/image" else b"It is no image."
        self.send_response(statuses.get(self.path, 404))
        self.send_header("Location", "http://other.test/")
        self.send_header("Content-Length", str(len(content) + (self.path == "/torn")))
        self.end_headers()
        self.wfile.write(content if self.path != "/torn" else content[:5])

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
    opened: ExitStack
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """Return the addresses of both operators' ports."""
        return [f"127.0.0.1:{item.environ['GATEWAY_OPS_PORT']}" for item in (self.api, self.worker)]

    def scrape_all(self) -> list[str]:
        """Scrape both processes."""
        return [HTTP.get(f"http://{target}/metrics").raise_for_status().text for target in self.targets]

    def sum_samples(self, name: str, **labels: str) -> float:
        """Sum the samples of a metric with these labels over both processes."""
        lines = [line for scrape in self.scrape_all() for line in scrape.splitlines() if line.startswith(name)]
        families = text_string_to_metric_families("\n".join(lines) + "\n")
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def call_admin(self, method: str, path: str, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        answer = HTTP.request(method, f"{self.api.ops_url}/admin/v1{path}", headers=headers, **more)
        assert answer.is_success, answer.text
        return answer.json()

    def create_account(self, name: str, count: int, money: int, **policy: Any) -> None:
        """Create an account at the upstream and in the registry; a task costs at most three yuan."""
        self.set_balance(name, count, money)
        prices = dict.fromkeys(Kind, 3)
        self.call_admin("PUT", f"/accounts/{name}", json={"user_key": name, "max_price": prices} | policy)

    def set_balance(self, name: str, count: int, money: int) -> None:
        body = {"count": count, "money": money}
        HTTP.put(f"{self.upstream.url}/_control/accounts/{name}", json=body).raise_for_status()

    def create_tenant(self, name: str, *accounts: str, **policy: Any) -> None:
        """Create a tenant on some accounts, with a token."""
        self.call_admin("PUT", f"/tenants/{name}", json={"accounts": accounts} | policy)
        self.tokens[name] = self.call_admin("POST", f"/tenants/{name}/tokens")["token"]

    def call(self, tenant: str, method: str, path: str, **more: Any) -> httpx2.Response:
        """Call the tenants' port as a tenant, or with an unknown token."""
        headers = {"Authorization": f"Bearer {self.tokens.get(tenant, 'unknown')}"} | dict(more.pop("headers", {}))
        return HTTP.request(method, self.api.url + path, headers=headers, **more)

    def submit(self, tenant: str, kind: str = "face-enhance", **more: Any) -> httpx2.Response:
        files = {"image": ("a.png", make_png(), "image/png")}
        return self.call(tenant, "POST", f"/v1/tasks/{kind}", files=files, **more)

    def submit_expecting(self, status: int, tenant: str = "steady", kind: str = "face-enhance") -> str:
        """Submit, which must have this status; returns the path of the task, if any."""
        answer = self.submit(tenant, kind)
        assert answer.status_code == status, answer.text
        return str(answer.json()["links"]["self"]) if answer.is_success else ""

    def run_task(self, tenant: str = "steady", kind: str = "face-enhance", state: str = "succeeded") -> str:
        """Run a task to its end, waiting with `Prefer: wait`; returns its path."""
        path = self.submit_expecting(201, tenant, kind)

        def has_ended() -> bool:
            current = self.call(tenant, "GET", path, headers={"Prefer": "wait=5"}).json()["state"]
            assert current in {"queued", "running", state}
            return bool(current == state)

        wait_until(has_ended, "the end of a task")
        return path

    @contextmanager
    def faults(self, *faults: dict[str, Any], seconds: float = 0) -> Iterator[None]:
        """Let the upstream have faults, once unless they say otherwise, and tasks take their time."""
        self.upstream.set_faults(*({"times": 1, **fault} for fault in faults), seconds=seconds)
        yield
        self.upstream.set_faults()

    def wait_for_sample(self, name: str, **labels: str) -> None:
        wait_until(lambda: self.sum_samples(name, **labels) > 0, f"{name} {labels}")


@contextmanager
def run_monitored_gateway(folder: Path) -> Iterator[MonitoredGateway]:
    """Start all processes."""
    with ExitStack() as opened:
        store = opened.enter_context(run_valkey("--appendonly", "yes", "--appendfsync", "always"))
        upstream = opened.enter_context(run_sandbox())
        shared = upstream.gateway_settings(store) | {"GATEWAY_IMAGE_URL_SECONDS": "1"}
        api = opened.enter_context(start_gateway(folder / "api", GATEWAY_ROLE="api", **shared))
        worker = opened.enter_context(start_gateway(folder / "worker", GATEWAY_ROLE="worker", **shared))
        receiver = opened.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), _CallerServer))
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
            opened=opened,
        )
        try:
            api.wait_ready()
            worker.wait_ready()
            yield gateway
        finally:
            receiver.shutdown()
            receiving.join()


def create_tenants(gateway: MonitoredGateway) -> None:
    """Create all accounts and tenants, and wait until the gateway has them."""
    gateway.create_account("main", 1_000, 1_000, floor_count=5, floor_money=10)
    gateway.create_account("money", 0, 1_000)
    gateway.create_account("leaky", 20, 500)
    gateway.create_account("empty", 0, 0)
    gateway.create_account("unknown", 5, 5)
    gateway.create_account("blind", 5, 5, max_price={})
    gateway.create_account("away", 5, 5, base_url=gateway.unreachable_url)
    limits = [{"window": item, "tasks": 500, "money": 500, "warn_at": [1]} for item in WINDOWS]
    gateway.create_tenant("steady", "main", limits=limits)
    ports = [urlsplit(url).port for url in (gateway.receiver_url, gateway.unreachable_url)]
    gateway.create_tenant("fetching", "main", allow_image_url=[f"127.0.0.0/8:{port}" for port in ports])
    for name in ("money", "leaky", "unknown", "blind", "away"):
        gateway.create_tenant(name, name)
    gateway.create_tenant("two-accounts", "unknown", "main")
    for name, policy in DENYING_POLICIES.items():
        gateway.create_tenant(name, _ACCOUNT.get(name, "money"), **policy)
    for name, status in RECEIVER_STATUSES.items():
        network = f"127.0.0.0/8:{urlsplit(gateway.receiver_url).port}"
        hook = {"url": f"{gateway.receiver_url}/{status}", "allow": [network]}
        gateway.create_tenant(name, "main", webhook=hook)
    wait_until(lambda: gateway.call(name, "GET", "/v1/quota").status_code == 200, "the update of the registry")


def run_tasks(gateway: MonitoredGateway) -> None:
    """Run every kind of task to its end, followed in every way."""
    for kind in Kind:  # one at a time, so that each cost can be observed
        gateway.run_task("money", kind)
    task, *_ = [gateway.run_task("steady", kind) for kind in Kind]
    for path in ("/v1/tasks", "/v1/tasks?limit=5", task, f"{task}/artifacts/image", "/v1/usage", "/v1/quota"):
        assert gateway.call("steady", "GET", path).status_code == 200, path
    identity = {"user_key": gateway.tokens["steady"]}
    for name in ("task", "vector_task", "face_enhance_task", "seamless_task"):
        image = {"input_image": ("a.png", make_png(), "image/png")}
        old = HTTP.post(f"{gateway.api.url}/api/submit_{name}", data=identity, files=image).json()
        check = {**identity, "task_id": old["task_id"]}
        assert HTTP.post(f"{gateway.api.url}/api/check_task_status", data=check).json()["err_code"] == 0
    refund = {"task": task.rpartition("/")[2], "reason": "It came out blank."}
    assert gateway.call_admin("POST", "/refunds", json=refund)["refund"]
    key = {"Idempotency-Key": '"once-and-no-more-than-once"'}
    assert len({gateway.submit("steady", headers=key).json()["id"] for _ in range(2)}) == 1
    with ThreadPoolExecutor() as threads, gateway.faults(seconds=1.5):
        running = gateway.submit_expecting(201)
        followed = threads.submit(gateway.call, "steady", "GET", f"{running}/events")
        waited = threads.submit(gateway.call, "steady", "GET", running, headers={"Prefer": "wait=10"})
        assert waited.result().json()["state"] == "succeeded"
        assert "succeeded" in followed.result().text


def send_refused(gateway: MonitoredGateway) -> None:
    """Send requests that are denied or invalid. At the turn of a minute the limit of minutes starts again."""
    for name in DENYING_POLICIES:
        with gateway.faults(seconds=2 if name == "max-active" else 0):
            wait_until(partial(_is_denied, gateway, name), "a refusal")
    for tenant, method, path, status in (
        ("unknown-token", "GET", "/v1/quota", 401),
        ("steady", "GET", "/v1/nothing", 404),
        ("steady", "DELETE", "/v1/quota", 405),
        ("steady", "POST", "/v1/tasks/upscale", 415),
    ):
        assert gateway.call(tenant, method, path).status_code == status
    assert HTTP.get(f"{gateway.api.ops_url}/admin/v1/accounts").status_code == 401


def inject_upstream_faults(gateway: MonitoredGateway) -> None:
    """Run tasks while the vendor's submits, checks and artifacts fail."""
    with gateway.faults({"on": "submit", "fail": "it could not be done"}):
        gateway.run_task(state="failed")
    for fault, tenant, status in (
        ({"reject": "too dark"}, "steady", 502),
        ({"reply": "reset"}, "steady", 504),
        ({"reply": "page", "status": 301, "when": "before"}, "steady", 503),
        ({"reply": "page", "status": 429, "when": "before"}, "steady", 503),
        ({"refuse": "账户不存在"}, "unknown", 503),
        ({"refuse": "账户不存在"}, "two-accounts", 201),
    ):
        gateway.call_admin("POST", "/accounts/unknown/reopen")
        with gateway.faults({"on": "submit", **fault}):
            gateway.submit_expecting(status, tenant)
    with gateway.faults({"times": None, "wrong": {"remaining_count": "missing", "remaining_money": "missing"}}):
        gateway.run_task("blind")
    for outcome, failure in CHECK_FAULTS.items():
        with gateway.faults({"on": "check", "times": None, **failure}):
            gateway.submit_expecting(201)
            gateway.wait_for_sample("gateway_poll_checks_total", outcome=outcome)
    artifact = f"{gateway.run_task()}/artifacts/image"
    for broken in ({"reply": "page", "status": 404}, {"reply": "page", "status": 500}, {"reply": "cut"}):
        with gateway.faults({"on": "file", **broken}), suppress(httpx2.RemoteProtocolError):
            assert gateway.call("steady", "GET", artifact).status_code in {502, 503}
    for _ in range(BREAKER_THRESHOLD + 1):
        gateway.submit_expecting(503, "away")


def spend_outside(gateway: MonitoredGateway) -> None:
    """Spend prepaid uses and money outside the gateway, so much that an alert pages."""
    for count, money in ((20, 500), (15, 500), (14, 300)):
        gateway.set_balance("leaky", count, money)
        gateway.run_task("leaky")
    unexplained = gateway.call_admin("GET", "/accounts/leaky")["unexplained"]
    assert unexplained["count"] > 0, unexplained
    assert unexplained["money"] > 0, unexplained


def interrupt_store(gateway: MonitoredGateway, is_noticed: Callable[[], bool]) -> None:
    """Let the store reject writes, then stop it until the metrics show that."""
    with gateway.faults(seconds=60):
        task = gateway.submit_expecting(201)
        with Redis(unix_socket_path=str(gateway.store.socket_path)) as client:
            client.config_set("min-replicas-to-write", 1)
            gateway.submit_expecting(503)
            client.config_set("min-replicas-to-write", 0)
        gateway.store.kill()
        assert gateway.call("steady", "GET", task).status_code == 200
        gateway.submit_expecting(503)
        wait_until(is_noticed, "word of a store that is away")
        restarted = gateway.opened.enter_context(subprocess.Popen(gateway.store.process.args))
        gateway.opened.callback(restarted.kill)
        wait_until(lambda: gateway.call("steady", "GET", "/v1/tasks").status_code == 200, "the return of the store")


def fetch_images(gateway: MonitoredGateway) -> None:
    """Submit images by URL, with every outcome of their fetch."""
    url = gateway.receiver_url
    for image_url, status in (
        (f"{url}/image", 201),
        (f"{url}/text", 415),
        (f"{url}/torn", 422),
        (f"{url}/moved", 422),
        (f"{url}/missing", 422),
        (f"{url}/silent", 422),
        (gateway.unreachable_url, 422),
    ):
        answer = gateway.call("fetching", "POST", "/v1/tasks/face-enhance", json={"image_url": image_url})
        assert answer.status_code == status, (image_url, answer.text)
    with suppress(httpx2.ReadTimeout):
        body = {"image_url": f"{url}/silent"}
        gateway.call("fetching", "POST", "/v1/tasks/face-enhance", json=body, timeout=0.2)
    gateway.wait_for_sample("gateway_image_fetches_total", outcome="cancelled")


def abandon_request(gateway: MonitoredGateway) -> None:
    """Disconnect a client that waits for the end of a task."""
    url = httpx2.URL(gateway.api.url)
    with gateway.faults(seconds=60), socket.create_connection((url.host, url.port)) as client:
        path, token = gateway.submit_expecting(201), gateway.tokens["steady"]
        head = f"GET {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {token}\r\nPrefer: wait=60\r\n\r\n"
        client.sendall(head.encode())
        gateway.wait_for_sample("gateway_waiting_clients")
    gateway.wait_for_sample("gateway_http_requests_total", status="499")


def outlast_deadlines(gateway: MonitoredGateway) -> None:
    """Advance the clock until a submission has outlasted its lease, and the failing receiver its last retry."""
    before = gateway.upstream.count_requests("submit")
    with ThreadPoolExecutor() as threads, gateway.faults({"on": "submit", "latency": 8, "reply": "reset"}):
        submitting = threads.submit(gateway.submit, "steady")
        wait_until(lambda: gateway.upstream.count_requests("submit") > before, "the submit")
        advance_clock(gateway.store, gateway.prefix, LEASE_SECONDS)
        gateway.wait_for_sample("gateway_reservations_expired_total")
        while not gateway.sum_samples("gateway_webhook_attempts_total", state="failed"):
            attempts = gateway.sum_samples("gateway_webhook_attempts_total")
            advance_clock(gateway.store, gateway.prefix, 2 * max(RETRY_SECONDS))
            wait_until(partial(_has_more_attempts, gateway, attempts), "another attempt")
        failed = gateway.call_admin("GET", "/webhooks/failed")["items"]
        gateway.call_admin("POST", f"/webhooks/{failed[0]['id']}/redeliver")
        assert submitting.result().status_code == 504


def _is_denied(gateway: MonitoredGateway, tenant: str) -> bool:
    return gateway.submit(tenant).status_code in {402, 429}


def _has_more_attempts(gateway: MonitoredGateway, count: float) -> bool:
    return gateway.sum_samples("gateway_webhook_attempts_total") > count
