"""A gateway over the sandbox, whose real balances are compared with the gateway's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from httpx2 import Response

from service.sandbox.faults import DEFAULT_PRICES
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import USER_KEY, RunningGateway, SandboxUpstreamControl, run_real_gateway
from tests.behaviour.requests import UNREACHABLE_POLICIES, expect_json, expect_problem, read_policies
from tests.support.valkey import Valkey

KIND = "vectorize"
PRICE_YUAN = DEFAULT_PRICES["vector"]
"""Price at the sandbox once the prepaid uses are spent, in yuan."""


@dataclass
class BalanceHarness:
    gateway: RunningGateway

    @property
    def sandbox(self) -> SandboxUpstreamControl:
        return self.gateway.upstream

    async def upstream_balance(self, user_key: str = USER_KEY) -> tuple[int, int]:
        """Return the upstream's balance: uses, and yuan."""
        balance = (await self.sandbox.control.list_accounts())[user_key]
        return balance.count, balance.money

    async def get_account(self, name: str = "main") -> dict[str, Any]:
        return expect_json(await self.gateway.call_admin("GET", f"/accounts/{name}"))

    async def shown_balance(self, name: str = "main") -> tuple[float | None, float | None]:
        """Return the balance that the gateway reports; None for a part it does not know."""
        account = await self.get_account(name)
        count, money = account["remaining_count"], account["remaining_money"]
        return count and count["value"], money and money["value"]

    async def read_counts(self) -> dict[str, Any]:
        """Return used and reserved amounts by policy; this sets limits that no test reaches."""
        await self.gateway.put_tenant(**UNREACHABLE_POLICIES)
        policies = await read_policies(self.gateway)
        return {name: (policy["used"], policy["reserved"]) for name, policy in policies.items()}

    async def submit(self, *, token: str | None = None, kind: str = KIND) -> Response:
        """Submit a millisecond later, so that earlier responses are older than this request."""
        await self.gateway.advance(0.001)
        return await self.gateway.submit(kind, token=token)

    async def expect_accepted(self, *, token: str | None = None, kind: str = KIND) -> dict[str, Any]:
        return expect_json(await self.submit(token=token, kind=kind), 201)

    async def wait_for_cost(self, task: dict[str, Any], *, token: str | None = None) -> dict[str, Any]:
        cost: dict[str, Any] = (await self.gateway.wait_for_task(task["id"], token=token))["cost"]
        return cost

    async def run_task(self) -> dict[str, Any]:
        return await self.wait_for_cost(await self.expect_accepted())

    async def run_tasks(self, number: int = 2) -> list[dict[str, Any]]:
        """Run tasks one after the other; the ledger learns price and time of charging from two."""
        return [await self.run_task() for _ in range(number)]

    async def submit_concurrently(self, number: int) -> tuple[list[dict[str, Any]], Counter[int]]:
        """Submit concurrently; return the accepted tasks and the statuses of the others.

        All are reserved or refused before the first response of the upstream.
        """
        with self.gateway.hold_responses() as held:
            submits = [asyncio.create_task(self.gateway.submit(KIND)) for _ in range(number)]
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

    async def expect_refused_locally(self, *, token: str | None = None) -> int:
        """Assert that a submit is refused without a request to the upstream; return the seconds to wait."""
        before = await self.sandbox.count_submits()
        response = await self.submit(token=token)
        expect_problem(response, 402, "balance-exhausted")
        assert await self.sandbox.count_submits() == before
        seconds = int(response.headers["retry-after"])
        assert 0 < seconds <= 60
        return seconds

    async def expect_failed_probe(self) -> None:
        """Assert that one submission reaches the upstream, which refuses it."""
        before = await self.sandbox.count_submits()
        expect_problem(await self.submit(), 402, "balance-exhausted")
        assert await self.sandbox.count_submits() == before + 1


@asynccontextmanager
async def open_balance_harness(valkey: Valkey, **behaviour: Any) -> AsyncIterator[BalanceHarness]:
    async with run_real_gateway(valkey) as gateway:
        await gateway.upstream.update_behaviour(**behaviour)
        yield BalanceHarness(gateway)
