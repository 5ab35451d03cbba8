"""Several gateways on one store and one upstream; each test has a tenant and an account of its own.

Once set, the ledger's clock stands still until it is advanced: the time to the end of a window is known exactly, and
nothing is checked meanwhile.

HTTP clients queue for connections and take more time than the gateways: here every concurrent request has an open
connection of its own, and all are sent before the first response is read.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx2
from redis import Redis

from service.domain.ledger import TenantState
from service.storage.connections import connect
from service.storage.ledger import RedisLedger
from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.usecases.ports import TenantSnapshot
from tests.model.ledger import roll_windows
from tests.process.gateway import HTTP, TIMEOUT_SECONDS, GatewayProcess, start_gateway, wait_until
from tests.process.sandbox import ADMIN_TOKEN, SandboxProcess, advance_clock, run_sandbox
from tests.support.images import make_png
from tests.support.server_time import install_server_time
from tests.support.tasks import make_retention
from tests.support.valkey import Valkey, run_valkey

DAY_SECONDS = 86_400
_CHECK_SECONDS = 0.1
_SUBMIT_ROUNDS = 5


async def send_concurrently(requests: Sequence[httpx2.Request]) -> list[httpx2.Response]:
    """Send all requests at once; return the responses in the same order."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        streams = await asyncio.gather(
            *(asyncio.open_connection(request.url.host, request.url.port) for request in requests)
        )
        for (_, writer), request in zip(streams, requests, strict=True):
            writer.write(_encode_request(request))
        try:
            return await asyncio.gather(*(_read_response(reader) for reader, _ in streams))
        finally:
            for _, writer in streams:
                writer.close()


def _encode_request(request: httpx2.Request) -> bytes:
    """Encode a request with `Connection: close`, so that the response ends with the connection."""
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % pair for pair in request.headers.raw if pair[0].lower() != b"connection"]
    return b"\r\n".join([*lines, b"Connection: close", b"", request.read()])


async def _read_response(reader: asyncio.StreamReader) -> httpx2.Response:
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
    return httpx2.Response(HTTPStatus(int(first.split()[1])), headers=headers, content=body)


def call_admin(gateway: GatewayProcess, method: str, path: str, **more: Any) -> Any:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    answer = HTTP.request(method, f"{gateway.ops_url}/admin/v1{path}", headers=headers, **more)
    assert answer.is_success, answer.text
    return answer.json()


def _is_ledger_unavailable(response: httpx2.Response) -> bool:
    is_error = response.status_code == httpx2.codes.SERVICE_UNAVAILABLE
    return is_error and bool(response.json()["code"] == "ledger-unavailable")


@dataclass(frozen=True)
class ProcessCluster:
    """Running gateways with their shared store and upstream."""

    gateways: Sequence[GatewayProcess]
    upstream: SandboxProcess
    store: Valkey
    prefix: str

    def create_tenant(
        self, policy: Mapping[str, Any], balance: Mapping[str, int], max_price: Mapping[str, int]
    ) -> TenantClient:
        """Create a tenant with a policy, alone on a new account with a balance, and wait until every gateway has it."""
        name, first = f"shop-{secrets.token_hex(4)}", self.gateways[0]
        HTTP.put(f"{self.upstream.url}/_control/accounts/{name}", json=balance).raise_for_status()
        call_admin(first, "PUT", f"/accounts/{name}", json={"user_key": name, "max_price": max_price})
        call_admin(first, "PUT", f"/tenants/{name}", json={"accounts": [name], **policy})
        shop = TenantClient(self, name, call_admin(first, "POST", f"/tenants/{name}/tokens")["token"])
        wait_until(lambda: all(map(shop.is_known_to, self.gateways)), "the news of a tenant")
        return shop

    def set_clock_to_noon(self) -> None:
        """Set the ledger's clock to noon of the next day."""
        day = asyncio.run(self._load_counters("demo")).now // 1000 // DAY_SECONDS
        with Redis(unix_socket_path=str(self.store.socket_path)) as client:
            client.set(Keys(self.prefix).clock + ":server", int((day + 1.5) * DAY_SECONDS) * 1000)

    def advance_clock(self, seconds: float) -> None:
        advance_clock(self.store, self.prefix, seconds)

    def read_counters(self, tenant: str) -> TenantState:
        result = asyncio.run(self._load_counters(tenant))
        roll_windows(result.state, result.now)
        return result.state

    async def _load_counters(self, tenant: str) -> TenantSnapshot:
        connections, keys = connect(self.store.url, timeout=TIMEOUT_SECONDS), Keys(self.prefix)
        scripts = RedisScripts(connections.commands)
        try:
            registry = await RedisRegistry(scripts, keys).load()
            return await RedisLedger(scripts, keys, make_retention()).tenant_snapshot(registry.tenants[tenant].id)
        finally:
            await connections.aclose()


@dataclass(frozen=True)
class TenantClient:
    """A tenant on an account of the same name."""

    cluster: ProcessCluster
    name: str
    token: str

    def is_known_to(self, gateway: GatewayProcess) -> bool:
        """Return whether a gateway has loaded the tenant."""
        return HTTP.get(f"{gateway.url}/v1/quota", headers=self._headers).status_code == 200

    def submit(self, times: int) -> list[httpx2.Response]:
        """Submit a small image so many times at once, to the gateways in turn.

        A busy machine causes responses `ledger-unavailable`, after which nothing was sent: these submits are repeated.
        """
        files = {"image": ("a.png", make_png(), "image/png")}
        requests = [
            httpx2.Request("POST", f"{gateway.url}/v1/tasks/face-enhance", headers=self._headers, files=files)
            for gateway in self.cluster.gateways
        ]
        pending, responses = list(islice(cycle(requests), times)), list[httpx2.Response]()
        for _ in range(_SUBMIT_ROUNDS):
            received = asyncio.run(send_concurrently(pending))
            responses += [response for response in received if not _is_ledger_unavailable(response)]
            pending = list(islice(cycle(requests), times - len(responses)))
            if not pending:
                return responses
        raise AssertionError(f"{len(pending)} submits got ledger-unavailable each time")

    def count_submits(self) -> int:
        """Return how many of its submits have reached the upstream."""
        received = HTTP.get(f"{self.cluster.upstream.url}/_control/requests").json()
        return sum(item["operation"] == "submit" and item["user_key"] == self.name for item in received)

    def read_balance(self) -> dict[str, int]:
        """Return its account's balance at the upstream."""
        body: dict[str, dict[str, int]] = HTTP.get(f"{self.cluster.upstream.url}/_control/accounts").json()
        return body[self.name]

    def read_counters(self) -> TenantState:
        return self.cluster.read_counters(self.name)

    def finish_tasks(self) -> TenantState:
        """Advance the clock until all its tasks have ended; returns the counters."""

        def ended() -> bool:
            self.cluster.advance_clock(_CHECK_SECONDS)
            return self.read_counters().active_tasks == 0

        wait_until(ended, "the end of all tasks")
        return self.read_counters()

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@contextmanager
def run_cluster(folder: Path, size: int) -> Iterator[ProcessCluster]:
    """Start several gateways at once."""
    install_server_time()
    with ExitStack() as opened:
        store, upstream = opened.enter_context(run_valkey()), opened.enter_context(run_sandbox())
        shared = upstream.gateway_settings(store)
        gateways = [opened.enter_context(start_gateway(folder / str(number), **shared)) for number in range(size)]
        for gateway in gateways:
            gateway.wait_ready()
        yield ProcessCluster(gateways, upstream, store, shared["GATEWAY_KEY_PREFIX"])
