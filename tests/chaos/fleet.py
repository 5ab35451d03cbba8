"""Several gateways on one store and one upstream; each test has a tenant and an account of its own on them.

Once it was set, the ledger's clock stands still until it is moved on: so the time to a window's end is known exactly,
and nothing is checked in the meantime.
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
from redis import Redis

from service.domain.ledger import TenantState
from service.storage.connections import connect
from service.storage.ledger import RedisLedger, Spans
from service.storage.redis import Keys, Scripts
from service.storage.registry import RedisRegistry
from service.usecases.ports import Snapshot
from tests.chaos.rush import rush
from tests.model.ledger_model import roll
from tests.process.gateway import SECONDS, Gateway, started, until
from tests.process.sandbox import ADMIN_TOKEN, Sandbox, advance, sandbox
from tests.support.images import png
from tests.support.server_time import install
from tests.support.valkey import Valkey, running

DAY = 86_400
_CHECK_SECONDS = 0.1


def admin(gateway: Gateway, method: str, path: str, **more: Any) -> Any:
    """Call the operators' port."""
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    answer = httpx2.request(method, f"{gateway.ops_url}/admin/v1{path}", headers=headers, timeout=SECONDS, **more)
    assert answer.is_success, answer.text
    return answer.json()


@dataclass(frozen=True)
class Fleet:
    """Gateways that have started, with the store and the upstream they share."""

    gateways: Sequence[Gateway]
    upstream: Sandbox
    store: Valkey
    prefix: str

    def shop(self, policy: Mapping[str, Any], balance: Mapping[str, int], max_price: Mapping[str, int]) -> Shop:
        """A new tenant with some policy, alone on a new account with a balance; every gateway knows it."""
        name, first = f"shop-{secrets.token_hex(4)}", self.gateways[0]
        httpx2.put(f"{self.upstream.url}/_control/accounts/{name}", json=balance).raise_for_status()
        admin(first, "PUT", f"/accounts/{name}", json={"user_key": name, "max_price": max_price})
        admin(first, "PUT", f"/tenants/{name}", json={"accounts": [name], **policy})
        shop = Shop(self, name, admin(first, "POST", f"/tenants/{name}/tokens")["token"])
        until(lambda: all(map(shop.known, self.gateways)), "the news of a tenant")
        return shop

    def noon(self) -> None:
        """Let it become noon of the next day, exactly."""
        day = asyncio.run(self._counters("demo")).now // 1000 // DAY
        with Redis(unix_socket_path=str(self.store.path)) as client:
            client.set(Keys(self.prefix).clock + ":server", int((day + 1.5) * DAY) * 1000)

    def pass_by(self, seconds: float) -> None:
        """Let time pass for the ledger."""
        advance(self.store, self.prefix, seconds)

    def counters(self, tenant: str) -> TenantState:
        """What the ledger counts for a tenant now."""
        found = asyncio.run(self._counters(tenant))
        roll(found.state, found.now)
        return found.state

    async def _counters(self, tenant: str) -> Snapshot:
        connections, keys = connect(self.store.url, timeout=SECONDS), Keys(self.prefix)
        scripts = Scripts(connections.commands)
        try:
            registry = await RedisRegistry(scripts, keys).load()
            return await RedisLedger(scripts, keys, Spans()).counters(registry.tenants[tenant].id)
        finally:
            await connections.aclose()


@dataclass(frozen=True)
class Shop:
    """A tenant, which uses the account of the same name."""

    fleet: Fleet
    name: str
    token: str

    def known(self, gateway: Gateway) -> bool:
        """Whether a gateway has heard of it."""
        return httpx2.get(f"{gateway.url}/v1/quota", headers=self._headers).status_code == 200

    def submit(self, times: int) -> list[httpx2.Response]:
        """Submit a small picture so many times at once, to one gateway after the other."""
        files = {"image": ("a.png", png(), "image/png")}
        requests = [
            httpx2.Request("POST", f"{gateway.url}/v1/tasks/face-enhance", headers=self._headers, files=files)
            for gateway in self.fleet.gateways
        ]
        return asyncio.run(rush(list(islice(cycle(requests), times))))

    def reached(self) -> int:
        """How many of its submits have reached the upstream."""
        received = httpx2.get(f"{self.fleet.upstream.url}/_control/requests", timeout=SECONDS).json()
        return sum(each["operation"] == "submit" and each["user_key"] == self.name for each in received)

    def balance(self) -> dict[str, int]:
        """What its account holds at the upstream."""
        found: dict[str, dict[str, int]] = httpx2.get(f"{self.fleet.upstream.url}/_control/accounts").json()
        return found[self.name]

    def counters(self) -> TenantState:
        """What the ledger counts for it now."""
        return self.fleet.counters(self.name)

    def finish(self) -> TenantState:
        """Let time pass until its tasks were checked and have all ended; the counters then."""

        def ended() -> bool:
            self.fleet.pass_by(_CHECK_SECONDS)
            return self.counters().active == 0

        until(ended, "the end of all tasks")
        return self.counters()

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@contextmanager
def fleet(folder: Path, size: int) -> Iterator[Fleet]:
    """So many gateways, started at once."""
    install()
    with ExitStack() as opened:
        store, upstream = opened.enter_context(running()), opened.enter_context(sandbox())
        shared = upstream.shared(store)
        gateways = [opened.enter_context(started(folder / str(number), **shared)) for number in range(size)]
        for gateway in gateways:
            gateway.ready()
        yield Fleet(gateways, upstream, store, shared["GATEWAY_KEY_PREFIX"])
