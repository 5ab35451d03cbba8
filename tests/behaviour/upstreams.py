"""What tests can have the upstream do, be it in memory or the sandbox."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from msgspec.structs import replace

from service.clients.vendor_api import in_english
from service.domain.ledger import Figures
from service.domain.tasks import TaskError
from service.sandbox.app import Control
from service.sandbox.faults import Dials, Fault
from service.sandbox.store import Balance
from service.usecases.ports import Answered, Check, SubmitOutcome, Submitted
from tests.fakes import FakeUpstream

USER_KEY = "upstream-key-main"


class Upstream(ABC):
    """What a test can make the upstream do, and what it can ask it."""

    @abstractmethod
    async def submits(self) -> int:
        """How many submits arrived."""

    @abstractmethod
    async def checks(self) -> int:
        """How many checks arrived."""

    @abstractmethod
    async def set_balance(self, count: int, money: int) -> None:
        """Give the account so many uses, and so many yuan."""

    @abstractmethod
    async def refuse_next(self, outcome: SubmitOutcome, reason: str = "") -> None:
        """Refuse the next submit: REJECTED for a reason, EXHAUSTED or INVALID_ACCOUNT, NOT_SENT at a dead address."""

    @abstractmethod
    async def lose_next_answer(self) -> None:
        """Take the next submit and let its answer be lost."""

    @abstractmethod
    async def keep_running(self) -> None:
        """Let tasks run on from now."""

    @abstractmethod
    async def fail_next_task(self) -> None:
        """Let the next task fail."""

    @abstractmethod
    async def idle(self) -> None:
        """Wait until it has done its work."""


class FakeControl(Upstream):
    """Steers the upstream in memory."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self._upstream = upstream

    async def submits(self) -> int:
        return len(self._upstream.submits)

    async def checks(self) -> int:
        return len(self._upstream.checks)

    async def set_balance(self, count: int, money: int) -> None:
        self._upstream.count, self._upstream.money = count, money * 100

    async def refuse_next(self, outcome: SubmitOutcome, reason: str = "") -> None:
        self._upstream.next_submits.append(Submitted(outcome=outcome, reason=reason, reason_en=in_english(reason)))

    async def lose_next_answer(self) -> None:
        self._upstream.next_submits.append(Submitted(outcome=SubmitOutcome.UNKNOWN))

    async def keep_running(self) -> None:
        self._upstream.next_checks += [Check(answered=Answered.RUNNING)] * 1_000

    async def fail_next_task(self) -> None:
        error = TaskError("task-failed", "It failed.")
        self._upstream.next_checks.append(Check(answered=Answered.FAILED, error=error, figures=Figures()))

    async def idle(self) -> None:
        pass


class SandboxControl(Upstream):
    """Steers the sandbox."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._dials = Dials()

    async def _add(self, **changes: Any) -> None:
        self._dials = replace(self._dials, **changes)
        await self._control.set_dials(self._dials)

    async def _fault(self, fault: Fault) -> None:
        await self._add(faults=(fault,))  # one that was set before, and may be used up, would begin anew

    async def submits(self) -> int:
        return sum(each.operation == "submit" for each in await self._control.requests())

    async def checks(self) -> int:
        return sum(each.operation == "check" for each in await self._control.requests())

    async def set_balance(self, count: int, money: int) -> None:
        await self._control.set_account(USER_KEY, Balance(count=count, money=money))

    async def refuse_next(self, outcome: SubmitOutcome, reason: str = "") -> None:
        if outcome is SubmitOutcome.NOT_SENT:
            return  # an account at a dead address does it
        words = {SubmitOutcome.EXHAUSTED: "账户剩余次数不足", SubmitOutcome.INVALID_ACCOUNT: "账户不存在"}
        refuse = words.get(outcome, f"任务提交失败:{reason}")
        await self._fault(Fault(on="submit", times=1, refuse=refuse))

    async def lose_next_answer(self) -> None:
        await self._fault(Fault(on="submit", times=1, reply="reset"))

    async def answer_after(self, seconds: float) -> None:
        """Take so long over the next submit."""
        await self._fault(Fault(on="submit", times=1, latency=seconds))

    async def keep_running(self) -> None:
        await self._add(seconds=3_600)

    async def fail_next_task(self) -> None:
        await self._fault(Fault(on="submit", times=1, fail="it could not be done"))

    async def idle(self) -> None:
        if not self._dials.seconds:
            await self._control.idle()
