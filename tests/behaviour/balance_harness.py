"""A house whose upstream can be audited: what it really holds, against what the gateway shows and has booked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from httpx2 import Response
from msgspec.structs import replace

from service.sandbox.app import SandboxControl
from service.sandbox.faults import DEFAULT_PRICES, Fault
from service.sandbox.store import AccountBalance
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.upstream_control import USER_KEY, SandboxUpstreamControl
from tests.support.valkey import Valkey

KIND = "vectorize"
PRICE_YUAN = DEFAULT_PRICES["vector"]
"""What a task of this kind costs at the sandbox once the uses are gone, in yuan."""
OVERLAP_SECONDS = 0.25
"""How long the upstream takes over submits that are to be under way together, in seconds."""
UNREACHABLE_LIMITS: dict[str, Any] = {
    "limits": [{"window": "total", "tasks": 10**6, "money": 10**6}],
    "max_active": 10**6,
}
"""Limits that nothing here reaches, so that every counter shows."""


@dataclass
class BalanceHarness:
    """A house, and the sandbox behind it."""

    gateway: RunningGateway
    sandbox: SandboxUpstreamControl

    @property
    def control(self) -> SandboxControl:
        """The sandbox's other side."""
        return self.sandbox.control

    async def set_behaviour(self, **dials: Any) -> None:
        """Turn some of the sandbox's dials."""
        await self.sandbox.update_behaviour(**dials)

    async def set_balance(self, count: int, money: int, user_key: str = USER_KEY) -> None:
        """Let an account of the upstream hold so many uses, and so many yuan."""
        await self.control.set_account(user_key, AccountBalance(count, money))

    async def upstream_balance(self, user_key: str = USER_KEY) -> tuple[int, int]:
        """What an account of the upstream really holds: uses, and yuan."""
        balance = (await self.control.list_accounts())[user_key]
        return balance.count, balance.money

    async def get_account(self, name: str = "main") -> dict[str, Any]:
        """An account as operators see it."""
        shown: dict[str, Any] = (await self.gateway.call_admin("GET", f"/accounts/{name}")).json()
        return shown

    async def shown_balance(self, name: str = "main") -> tuple[float | None, float | None]:
        """What the gateway believes that an account holds; None for a figure it has never seen."""
        account = await self.get_account(name)
        count, money = account["remaining_count"], account["remaining_money"]
        return count and count["value"], money and money["value"]

    async def read_policies(self, tenant: str = "shop") -> dict[str, Any]:
        """What a tenant has used and holds by policy, once limits that nothing reaches have been put on it."""
        await self.gateway.put_tenant(tenant, **UNREACHABLE_LIMITS)
        policies = (await self.gateway.call_admin("GET", f"/tenants/{tenant}")).json()["policies"]
        return {each["policy"]: (each["used"], each["reserved"]) for each in policies}

    async def submit(self, *, token: str | None = None, kind: str = KIND) -> Response:
        """Submit a moment later, so that an answer of before is older than this request."""
        await self.gateway.advance(0.001)
        return await self.gateway.submit(kind, token=token)

    async def expect_accepted(self, *, token: str | None = None, kind: str = KIND) -> dict[str, Any]:
        """Submit what has to be accepted."""
        answer = await self.submit(token=token, kind=kind)
        assert answer.status_code == 201, answer.text
        task: dict[str, Any] = answer.json()
        return task

    async def wait_for_cost(self, task: dict[str, Any], *, token: str | None = None) -> dict[str, Any]:
        """Wait for the end of a task and give its cost."""
        cost: dict[str, Any] = (await self.gateway.wait_for_task(task["id"], token=token))["cost"]
        return cost

    async def run_task(self, *, token: str | None = None, kind: str = KIND) -> dict[str, Any]:
        """Have a task done from beginning to end, and give its cost."""
        return await self.wait_for_cost(await self.expect_accepted(token=token, kind=kind), token=token)

    async def submit_concurrently(
        self, number: int, *, token: str | None = None
    ) -> tuple[list[dict[str, Any]], Counter[int]]:
        """Submit so many at once; the tasks of those that were accepted, and the statuses of the others.

        The upstream takes its time, so that all have asked for a place before the first of them is answered.
        """
        faults = (await self.control.get_behaviour()).faults
        await self.set_behaviour(
            faults=tuple(replace(each, latency=OVERLAP_SECONDS) for each in faults or (Fault(on="submit"),))
        )
        answers = await asyncio.gather(*(self.gateway.submit(KIND, token=token) for _ in range(number)))
        await self.set_behaviour(faults=faults)
        tasks = [answer.json() for answer in answers if answer.status_code == 201]
        return tasks, Counter(answer.status_code for answer in answers if answer.status_code != 201)

    async def run_balance_checks(self, seconds: float = 60) -> int:
        """Let a while pass and be looked at what is due in both of two processes; the checks that took."""
        before = await self.sandbox.count_checks()
        await self.gateway.advance(seconds)
        looks = self.gateway.services.balance_refresher
        await asyncio.gather(looks.refresh_due(), looks.refresh_due())
        return await self.sandbox.count_checks() - before

    async def expect_refused_locally(self, *, token: str | None = None) -> Response:
        """Submit what has to be refused with 402, and a time to come back, without asking the upstream."""
        before = await self.sandbox.count_submits()
        answer = await self.submit(token=token)
        expect_problem(answer, 402, "balance-exhausted")
        assert 0 < int(answer.headers["retry-after"]) <= 60
        assert await self.sandbox.count_submits() == before
        return answer


@asynccontextmanager
async def open_balance_harness(valkey: Valkey, **dials: Any) -> AsyncIterator[BalanceHarness]:
    """A house over a real Valkey and the sandbox, with its dials turned."""
    async with run_real_gateway(valkey) as house:
        assert isinstance(house.upstream, SandboxUpstreamControl)
        books = BalanceHarness(house, house.upstream)
        await books.set_behaviour(**dials)
        yield books
