"""Several gateways on one store and one upstream; each test has a tenant and an account of its own.

Once set, the ledger's clock stands still until it is advanced: the time to the end of a window is known exactly, and
nothing is checked meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx2

from tests.process.gateway import HTTP, TIMEOUT_SECONDS, GatewayProcess, start_gateway, wait_until
from tests.process.sandbox import ADMIN_TOKEN, SandboxProcess, advance_clock, read_clock, run_sandbox
from tests.support.images import make_png
from tests.support.valkey import Valkey, run_valkey

DAY_SECONDS = 86_400
_CHECK_SECONDS = 0.1
_SUBMIT_ROUNDS = 5


async def send_concurrently(requests: Sequence[httpx2.Request]) -> list[httpx2.Response]:
    """Send all requests at once; return the responses in the same order."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False, limits=limits) as client:
        return await asyncio.gather(*(client.send(request) for request in requests))


def call_admin(gateway: GatewayProcess, method: str, path: str, **more: Any) -> Any:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    answer = HTTP.request(method, f"{gateway.ops_url}/admin/v1{path}", headers=headers, **more)
    assert answer.is_success, answer.text
    return answer.json()


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

        def is_known() -> bool:
            return all(shop.get(gateway, "/v1/quota").status_code == 200 for gateway in self.gateways)

        wait_until(is_known, "the news of a tenant")
        return shop

    def set_clock_to_noon(self) -> None:
        """Set the ledger's clock to noon of the next day."""
        seconds = read_clock(self.store, self.prefix)
        self.advance_clock((seconds // DAY_SECONDS + 1.5) * DAY_SECONDS - seconds)

    def advance_clock(self, seconds: float) -> None:
        advance_clock(self.store, self.prefix, seconds)


@dataclass(frozen=True)
class TenantClient:
    """A tenant on an account of the same name."""

    cluster: ProcessCluster
    name: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def get(self, gateway: GatewayProcess, path: str) -> httpx2.Response:
        return HTTP.get(gateway.url + path, headers=self.headers)

    def submit(self, times: int) -> list[httpx2.Response]:
        """Submit a small image so many times at once, to the gateways in turn.

        A busy machine causes responses `ledger-unavailable`, after which nothing was sent: these submits are repeated.
        """
        responses: list[httpx2.Response] = []
        for _ in range(_SUBMIT_ROUNDS):
            gateways = islice(cycle(self.cluster.gateways), times - len(responses))
            received = asyncio.run(send_concurrently([self.build_submission(gateway) for gateway in gateways]))
            responses += [item for item in received if item.status_code != httpx2.codes.SERVICE_UNAVAILABLE]
            if len(responses) == times:
                return responses
        raise AssertionError(f"of {times} submits only {len(responses)} got another response than 503")

    def build_submission(self, gateway: GatewayProcess, image: bytes = b"", **headers: str) -> httpx2.Request:
        files = {"image": ("a.png", image or make_png(), "application/octet-stream")}
        path = f"{gateway.url}/v1/tasks/face-enhance"
        return httpx2.Request("POST", path, headers=self.headers | headers, files=files)

    def count_submits(self) -> int:
        """Return how many of its submits have reached the upstream."""
        received = HTTP.get(f"{self.cluster.upstream.url}/_control/requests").json()
        return sum(item["operation"] == "submit" and item["user_key"] == self.name for item in received)

    def read_policies(self) -> dict[str, dict[str, Any]]:
        """Return the counters of its limits by the name of the policy."""
        answer = self.get(self.cluster.gateways[-1], "/v1/quota").json()
        return {item["policy"]: item for item in answer["policies"]}

    def finish_tasks(self) -> dict[str, dict[str, Any]]:
        """Advance the clock until all its tasks, whose number is limited, have ended; return the counters."""

        def have_ended() -> bool:
            self.cluster.advance_clock(_CHECK_SECONDS)
            return bool(self.read_policies()["max-active"]["used"] == 0)

        wait_until(have_ended, "the end of all tasks")
        return self.read_policies()


@contextmanager
def run_cluster(folder: Path, size: int) -> Iterator[ProcessCluster]:
    """Start several gateways at once."""
    with ExitStack() as opened:
        store, upstream = opened.enter_context(run_valkey()), opened.enter_context(run_sandbox())
        shared = upstream.gateway_settings(store)
        gateways = [opened.enter_context(start_gateway(folder / str(number), **shared)) for number in range(size)]
        for gateway in gateways:
            gateway.wait_ready()
        yield ProcessCluster(gateways, upstream, store, shared["GATEWAY_KEY_PREFIX"])
