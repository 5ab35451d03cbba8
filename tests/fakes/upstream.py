"""Test double of the upstream client."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.domain.ledger import Balance
from service.domain.tasks import Artifact, ArtifactName, Options
from service.domain.tenants import Account
from service.usecases.ports import CheckOutcome, CheckResult, Image, SubmitOutcome, SubmitResult

PRICE = 100
"""Price of a task without prepaid uses, in fen."""


@dataclass
class FakeUpstream:
    """Upstream with scripted results; by default it accepts, charges and then succeeds."""

    count: int = 10
    money: int = 30_000
    submits: list[tuple[str, Options, Image]] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    next_submits: list[SubmitResult] = field(default_factory=list)
    next_checks: list[CheckResult] = field(default_factory=list)

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        del timeout_seconds
        self.submits.append((account.name, options, image))
        if self.next_submits:
            return self.next_submits.pop(0)
        if self.count:
            self.count -= 1
        else:
            self.money -= PRICE
        figures = Balance(self.count, self.money)
        return SubmitResult(outcome=SubmitOutcome.ACCEPTED, upstream_id=f"up-{len(self.submits)}", balance=figures)

    async def check(self, account: Account, upstream_id: str) -> CheckResult:
        del account
        self.checks.append(upstream_id)
        if self.next_checks:
            return self.next_checks.pop(0)
        return CheckResult(
            outcome=CheckOutcome.SUCCEEDED,
            artifacts=(Artifact(ArtifactName.IMAGE, f"http://upstream.test/{upstream_id}.png"),),
            balance=Balance(self.count, self.money),
        )
