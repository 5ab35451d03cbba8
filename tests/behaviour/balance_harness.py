"""A gateway over the sandbox, whose real balances are compared with the gateway's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from httpx2 import Response

from service.sandbox.app import SandboxControl
from service.sandbox.faults import DEFAULT_PRICES
from service.sandbox.store import AccountBalance
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import USER_KEY, RunningGateway, SandboxUpstreamControl, run_real_gateway
from tests.behaviour.requests import expect_problem
from tests.support.valkey import Valkey

KIND = "vectorize"
PRICE_YUAN = DEFAULT_PRICES["vector"]
"""Price at the sandbox once the prepaid uses are spent, in yuan."""
UNREACHABLE_LIMITS: dict[str, Any] = {
    "limits": [{"window": "total", "tasks": 10**6, "money": 10**6}],
    "max_active": 10**6,
}
"""Limits that no test reaches, so that every counter is reported."""


@dataclass
class BalanceHarness:
    gateway: RunningGateway
    sandbox: SandboxUpstreamControl

    @property
    def control(self) -> SandboxControl:
        return self.sandbox.control

    async def set_behaviour(self, **behaviour: Any) -> None:
        await self.sandbox.update_behaviour(**behaviour)

    async def set_balance(self, count: int, money: int, user_key: str = USER_KEY) -> None:
        """Set the upstream's balance: uses, and yuan."""
        await self.control.set_account(user_key, AccountBalance(count, money))

    async def upstream_balance(self, user_key: str = USER_KEY) -> tuple[int, int]:
        """Return the upstream's balance: uses, and yuan."""
        balance = (await self.control.list_accounts())[user_key]
        return balance.count, balance.money

    async def get_account(self, name: str = "main") -> dict[str, Any]:
        account: dict[str, Any] = (await self.gateway.call_admin("GET", f"/accounts/{name}")).json()
        return account

    async def shown_balance(self, name: str = "main") -> tuple[float | None, float | None]:
        """Return the balance that the gateway reports; None for a part it does not know."""
        account = await self.get_account(name)
        count, money = account["remaining_count"], account["remaining_money"]
        return count and count["value"], money and money["value"]

    async def read_policies(self, tenant: str = "shop") -> dict[str, Any]:
        """Return used and reserved amounts by policy; this sets limits that no test reaches."""
        await self.gateway.put_tenant(tenant, **UNREACHABLE_LIMITS)
        policies = (await self.gateway.call_admin("GET", f"/tenants/{tenant}")).json()["policies"]
        return {policy["policy"]: (policy["used"], policy["reserved"]) for policy in policies}

    async def submit(self, *, token: str | None = None, kind: str = KIND) -> Response:
        """Submit a millisecond later, so that earlier responses are older than this request."""
        await self.gateway.advance(0.001)
        return await self.gateway.submit(kind, token=token)

    async def expect_accepted(self, *, token: str | None = None, kind: str = KIND) -> dict[str, Any]:
        response = await self.submit(token=token, kind=kind)
        assert response.status_code == 201, response.text
        task: dict[str, Any] = response.json()
        return task

    async def wait_for_cost(self, task: dict[str, Any], *, token: str | None = None) -> dict[str, Any]:
        cost: dict[str, Any] = (await self.gateway.wait_for_task(task["id"], token=token))["cost"]
        return cost

    async def run_task(self, *, token: str | None = None, kind: str = KIND) -> dict[str, Any]:
        return await self.wait_for_cost(await self.expect_accepted(token=token, kind=kind), token=token)

    async def submit_concurrently(
        self, number: int, *, token: str | None = None
    ) -> tuple[list[dict[str, Any]], Counter[int]]:
        """Submit concurrently; return the accepted tasks and the statuses of the others.

        All are reserved or refused before the first response of the upstream.
        """
        with self.gateway.hold_responses() as held:
            submits = [asyncio.create_task(self.gateway.submit(KIND, token=token)) for _ in range(number)]
            await wait_until(lambda: held.count + sum(submit.done() for submit in submits) == number)
        responses = await asyncio.gather(*submits)
        tasks = [response.json() for response in responses if response.status_code == 201]
        return tasks, Counter(response.status_code for response in responses if response.status_code != 201)

    async def run_balance_checks(self, seconds: float = 60) -> int:
        """Advance the time and run the balance checks of two processes; return the number of upstream checks."""
        before = await self.sandbox.count_checks()
        await self.gateway.advance(seconds)
        refresher = self.gateway.services.balance_refresher
        await asyncio.gather(refresher.refresh_due(), refresher.refresh_due())
        return await self.sandbox.count_checks() - before

    async def expect_refused_locally(self, *, token: str | None = None) -> Response:
        """Assert that a submit is refused with 402 and Retry-After without a request to the upstream."""
        before = await self.sandbox.count_submits()
        response = await self.submit(token=token)
        expect_problem(response, 402, "balance-exhausted")
        assert 0 < int(response.headers["retry-after"]) <= 60
        assert await self.sandbox.count_submits() == before
        return response


@asynccontextmanager
async def open_balance_harness(valkey: Valkey, **behaviour: Any) -> AsyncIterator[BalanceHarness]:
    async with run_real_gateway(valkey) as gateway:
        harness = BalanceHarness(gateway, gateway.upstream)
        await harness.set_behaviour(**behaviour)
        yield harness
