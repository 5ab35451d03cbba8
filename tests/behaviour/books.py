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

from service.sandbox.app import Control
from service.sandbox.faults import PRICES, Fault
from service.sandbox.store import Balance
from tests.behaviour.aftermath import problem
from tests.behaviour.house import House, real_house
from tests.behaviour.upstreams import USER_KEY, SandboxControl
from tests.support.valkey import Valkey

KIND = "vectorize"
PRICE = PRICES["vector"]
"""What a task of this kind costs at the sandbox once the uses are gone, in yuan."""
TOGETHER = 0.25
"""How long the upstream takes over submits that are to be under way together, in seconds."""
BOUNDLESS: dict[str, Any] = {"limits": [{"window": "total", "tasks": 10**6, "money": 10**6}], "max_active": 10**6}
"""Limits that nothing here reaches, so that every counter shows."""


@dataclass
class Books:
    """A house, and the sandbox behind it."""

    house: House
    sandbox: SandboxControl

    @property
    def control(self) -> Control:
        """The sandbox's other side."""
        return self.sandbox._control

    async def turn(self, **dials: Any) -> None:
        """Turn some of the sandbox's dials."""
        await self.sandbox._add(**dials)

    async def give(self, count: int, money: int, user_key: str = USER_KEY) -> None:
        """Let an account of the upstream hold so many uses, and so many yuan."""
        await self.control.set_account(user_key, Balance(count, money))

    async def held(self, user_key: str = USER_KEY) -> tuple[int, int]:
        """What an account of the upstream really holds: uses, and yuan."""
        balance = (await self.control.accounts())[user_key]
        return balance.count, balance.money

    async def account(self, name: str = "main") -> dict[str, Any]:
        """An account as operators see it."""
        shown: dict[str, Any] = (await self.house.admin("GET", f"/accounts/{name}")).json()
        return shown

    async def shown(self, name: str = "main") -> tuple[float | None, float | None]:
        """What the gateway believes that an account holds; None for a figure it has never seen."""
        account = await self.account(name)
        count, money = account["remaining_count"], account["remaining_money"]
        return count and count["value"], money and money["value"]

    async def counted(self, tenant: str = "shop") -> dict[str, Any]:
        """What a tenant has used and holds by policy, once limits that nothing reaches have been put on it."""
        await self.house.put_tenant(tenant, **BOUNDLESS)
        policies = (await self.house.admin("GET", f"/tenants/{tenant}")).json()["policies"]
        return {each["policy"]: (each["used"], each["reserved"]) for each in policies}

    async def submit(self, *, token: str | None = None, kind: str = KIND) -> Response:
        """Submit a moment later, so that an answer of before is older than this request."""
        await self.house.advance(0.001)
        return await self.house.submit(kind, token=token)

    async def accepted(self, *, token: str | None = None, kind: str = KIND) -> dict[str, Any]:
        """Submit what has to be accepted."""
        answer = await self.submit(token=token, kind=kind)
        assert answer.status_code == 201, answer.text
        task: dict[str, Any] = answer.json()
        return task

    async def cost(self, task: dict[str, Any], *, token: str | None = None) -> dict[str, Any]:
        """Wait for the end of a task and give its cost."""
        cost: dict[str, Any] = (await self.house.finished(task["id"], token=token))["cost"]
        return cost

    async def spend(self, *, token: str | None = None, kind: str = KIND) -> dict[str, Any]:
        """Have a task done from beginning to end, and give its cost."""
        return await self.cost(await self.accepted(token=token, kind=kind), token=token)

    async def at_once(self, number: int, *, token: str | None = None) -> tuple[list[dict[str, Any]], Counter[int]]:
        """Submit so many at once; the tasks of those that were accepted, and the statuses of the others.

        The upstream takes its time, so that all have asked for a place before the first of them is answered.
        """
        faults = (await self.control.dials()).faults
        await self.turn(faults=tuple(replace(each, latency=TOGETHER) for each in faults or (Fault(on="submit"),)))
        answers = await asyncio.gather(*(self.house.submit(KIND, token=token) for _ in range(number)))
        await self.turn(faults=faults)
        tasks = [answer.json() for answer in answers if answer.status_code == 201]
        return tasks, Counter(answer.status_code for answer in answers if answer.status_code != 201)

    async def looked(self, seconds: float = 60) -> int:
        """Let a while pass and be looked at what is due in both of two processes; the checks that took."""
        before = await self.sandbox.checks()
        await self.house.advance(seconds)
        looks = self.house.services.looks
        await asyncio.gather(looks.tick(), looks.tick())
        return await self.sandbox.checks() - before

    async def refused_unasked(self, *, token: str | None = None) -> Response:
        """Submit what has to be refused with 402, and a time to come back, without asking the upstream."""
        before = await self.sandbox.submits()
        answer = await self.submit(token=token)
        problem(answer, 402, "balance-exhausted")
        assert 0 < int(answer.headers["retry-after"]) <= 60
        assert await self.sandbox.submits() == before
        return answer


@asynccontextmanager
async def opened_books(valkey: Valkey, **dials: Any) -> AsyncIterator[Books]:
    """A house over a real Valkey and the sandbox, with its dials turned."""
    async with real_house(valkey) as house:
        assert isinstance(house.upstream, SandboxControl)
        books = Books(house, house.upstream)
        await books.turn(**dials)
        yield books
