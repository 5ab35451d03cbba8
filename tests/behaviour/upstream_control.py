"""Control of the sandbox in tests."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec.structs import replace

from service.domain.tasks import Options
from service.domain.tenants import Account
from service.sandbox.app import SandboxControl
from service.sandbox.faults import Behaviour, Fault
from service.sandbox.store import AccountBalance
from service.usecases.ports import Image, SubmitOutcome, SubmitResult, Upstream

USER_KEY = "upstream-key-main"


class HeldResponses:
    """Passes submits on to the upstream and holds its responses until they are released."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.check = upstream.check
        self.count = 0
        self._released = asyncio.Event()

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        result = await self.upstream.submit(account, options, image, timeout_seconds=timeout_seconds)
        self.count += 1
        await self._released.wait()
        return result

    def release(self) -> None:
        self._released.set()


class SandboxUpstreamControl:
    def __init__(self, control: SandboxControl) -> None:
        self.control = control
        self._behaviour = Behaviour()

    async def update_behaviour(self, **changes: Any) -> None:
        self._behaviour = replace(self._behaviour, **changes)
        await self.control.set_behaviour(self._behaviour)

    async def set_fault(self, **fault: Any) -> None:
        await self._set_fault(Fault(**fault))

    async def _set_fault(self, fault: Fault) -> None:
        await self.update_behaviour(faults=(fault,))  # one that was set before, and may be used up, would begin anew

    async def count_submits(self) -> int:
        return sum(request.operation == "submit" for request in await self.control.list_requests())

    async def count_checks(self) -> int:
        return sum(request.operation == "check" for request in await self.control.list_requests())

    async def set_balance(self, count: int, money: int) -> None:
        """Set the balance of the account: uses, and yuan."""
        await self.control.set_account(USER_KEY, AccountBalance(count=count, money=money))

    async def refuse_next(self, outcome: SubmitOutcome, reason: str = "") -> None:
        """Refuse the next submit; `reason` is the vendor's for REJECTED."""
        words = {SubmitOutcome.EXHAUSTED: "账户剩余次数不足", SubmitOutcome.INVALID_ACCOUNT: "账户不存在"}
        refuse = words.get(outcome, f"任务提交失败:{reason}")
        await self.set_fault(on="submit", times=1, refuse=refuse)

    async def lose_next_response(self) -> None:
        """Accept the next submit and drop its response."""
        await self.set_fault(on="submit", times=1, reply="reset")

    async def delay_next_response(self, seconds: float) -> None:
        await self.set_fault(on="submit", times=1, latency=seconds)

    async def keep_running(self) -> None:
        await self.update_behaviour(seconds=3_600)

    async def fail_next_task(self) -> None:
        await self.set_fault(on="submit", times=1, fail="it could not be done")

    async def wait_until_idle(self) -> None:
        """Wait until all tasks have ended, unless they run without end."""
        if not self._behaviour.seconds:
            await self.control.wait_until_idle()
