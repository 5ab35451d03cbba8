"""Compares the vendor's truth with what callers were told and with the ledger, once everything has ended.

What was known to an emptied store only is lost with it: counters, idempotency keys, unknown submissions, refunds and
queued events. A submission that began before the store was emptied is therefore excused from the rules about these.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import httpx2

from tests.chaos.faults import LEASE_SECONDS, ProcessFaults
from tests.chaos.gateways import Gateways
from tests.chaos.history import Attempt, History
from tests.chaos.receiver import Receiver
from tests.chaos.traffic import NOT_CHARGED, TenantCase
from tests.chaos.vendor import Reply, Vendor, VendorTask

SETTLE_SECONDS = 90.0
_RETRY_STEP_SECONDS = 150
SETTLEMENT_SECONDS = 20.0
"""After its response, an accepted submission is settled within this time, even if the store is away for some."""
_WINDOW_DIGITS = {"minute": 16, "hour": 13, "day": 10, "month": 7, "total": 0}
EXCLUSIVE_ACCOUNTS = frozenset({"rich", "capped", "paid", "reserve"})


@dataclass
class TenantReport:
    """What the gateway reports of a tenant in the end."""

    tasks: dict[str, dict[str, Any]]
    by_content: dict[str, list[dict[str, Any]]]
    unknown: list[dict[str, Any]]
    refunded: list[dict[str, Any]]
    usage: dict[str, Any]
    policies: dict[str, dict[str, Any]]


@dataclass
class Auditor:
    history: History
    vendor: Vendor
    gateways: Gateways
    receiver: Receiver
    process_faults: ProcessFaults
    tenants: Sequence[TenantCase]
    attempts: Mapping[str, list[Attempt]] = field(default_factory=dict)
    _usage_path: str = field(default_factory=lambda: f"/v1/usage?from={datetime.now(UTC):%Y-%m-%d}")

    def _report(self, rule: str, detail: str, *, at: float = 0, contents: Sequence[str] = ()) -> None:
        self.history.add_violation(rule, detail, at=at, contents=frozenset(contents))

    async def watch_limits(self) -> None:
        """Require at any time that no policy is passed, until cancelled."""
        while True:
            for tenant in self.tenants:
                if tenant.has_constant_limits:
                    await self._watch_tenant(tenant)
            await asyncio.sleep(0.5)

    async def _watch_tenant(self, tenant: TenantCase) -> None:
        quota = await self._get(tenant, "/v1/quota", attempts=1)
        for policy in quota["policies"] if quota else ():
            excess = policy["used"] + policy["reserved"] - policy["limit"]
            if policy["policy"] == "max-active":
                # A submission whose lease expired has no active place until its late outcome.
                excess -= self._count_overdue(tenant)
            if excess > 0 and not self.history.flushed_at:
                self._report("over-admitted", f"{tenant.name}: {policy}")

    def _count_overdue(self, tenant: TenantCase) -> int:
        since = time.monotonic() - SETTLEMENT_SECONDS
        return sum(
            self._may_be_overdue(attempt)
            for attempt in tenant.submitted
            if any(task.ends_at > since for task in self.vendor.accepted(attempt.content))
        )

    def _may_be_overdue(self, attempt: Attempt) -> bool:
        """Return whether the clock passed its lease before its outcome, which may be written some time after it."""
        end = min(attempt.ended_at, time.monotonic())
        until = end + (SETTLEMENT_SECONDS if not attempt.status or self.history.is_cut_off(end, end) else 1)
        return any(attempt.started_at <= advanced_at <= until for advanced_at in self.history.advanced_at)

    async def _get(self, tenant: TenantCase, path: str, *, attempts: int = 40) -> Any:
        """Read as a tenant, again while the answer is 503 or the connection fails.

        Returns None for any other error, which is reported, and after a single attempt.
        """
        headers = {"Authorization": f"Bearer {tenant.token}"}
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(0.25)
            serving = [gateway for gateway in self.gateways.members if gateway.serves]
            if not serving:
                continue
            try:
                response = await self.gateways.client.get(serving[attempt % len(serving)].url + path, headers=headers)
            except httpx2.TransportError:
                continue
            if response.is_success:
                return response.json()
            if response.status_code != httpx2.codes.SERVICE_UNAVAILABLE and attempts > 1:
                self._report("lost", f"{tenant.name}: GET {path} answers {response.status_code} {response.text[:200]}")
                return None
        if attempts > 1:
            raise AssertionError(f"{tenant.name}: GET {path} has no answer")
        return None

    async def audit(self) -> None:
        """Wait until everything has ended, then check every rule."""
        grouped: dict[str, list[Attempt]] = defaultdict(list)
        for attempt in self.history.attempts:
            grouped[attempt.content].append(attempt)
        self.attempts = grouped
        for gateway in self.gateways.members:
            if gateway.process is None or gateway.process.returncode is not None:
                self._report("wrong exit", f"the gateway {gateway.role} has ended by itself")
        for tenant in self.tenants:
            await self._check_listed(tenant)
        await self._read_tasks()  # which makes an emptied store know them again
        await self.process_faults.advance_clock(LEASE_SECONDS + 20)
        await self._read_tasks()  # settles what killed processes left: a read does so only after the lease
        await self._wait_until_settled()
        for content, items in grouped.items():
            self._check_receipts(content, items)
            self._check_answers(content, items)
        charged = 0
        for tenant in self.tenants:
            books = await self._read_books(tenant)
            charged += books.usage["total"]["charged"]["tasks"]
            self._check_tasks(tenant, books)
            self._check_sums(tenant, books)
            self._check_limits(tenant, books)
        of_all = (await self.gateways.read_admin(self._usage_path.removeprefix("/v1")))["total"]["charged"]["tasks"]
        if of_all != charged:
            self._report("books", f"the tenants were charged for {charged} tasks, all of them for {of_all}")
        self._check_webhooks()

    async def _read_tasks(self) -> None:
        for tenant in self.tenants:
            for task in tenant.tasks:
                await self._get(tenant, f"/v1/tasks/{task}")

    async def _wait_until_settled(self) -> None:
        """Wait until nothing is reserved, active, in flight or undelivered."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while waiting := await self._list_unsettled():
            if time.monotonic() > deadline:
                self._report("unsettled", ", ".join(waiting))
                return
            await asyncio.sleep(2)
            await self.process_faults.advance_clock(_RETRY_STEP_SECONDS)  # for events that are sent again later

    async def _list_unsettled(self) -> list[str]:
        waiting = []
        for tenant in self.tenants:
            quota = await self._get(tenant, "/v1/quota") or {"policies": []}
            for policy in quota["policies"]:
                held = policy["used"] if policy["policy"] == "max-active" else policy["reserved"]
                if held:
                    waiting.append(f"{tenant.name}: {held} of {policy['policy']}")
            waiting += self._find_unreported(tenant, quota["policies"])
            running = (await self._get(tenant, self._usage_path))["total"]["tasks"]["running"]
            if running:
                waiting.append(f"{tenant.name}: {running} running tasks")
        for account in (await self.gateways.read_admin("/accounts"))["items"]:
            waiting += [f"account {account['name']}: in flight"] if account["in_flight"] else []
        missing = len(self._find_undelivered())
        return [*waiting, f"{missing} events"] if missing else waiting

    async def _check_listed(self, tenant: TenantCase) -> None:
        """A task that got 201 is listed before it is read by its id, unless its process died before it settled it."""
        deadline = time.monotonic() + SETTLEMENT_SECONDS
        expected = {
            attempt.task
            for attempt in tenant.submitted
            if attempt.task
            and not self._is_excused(attempt.content)
            and not self.history.is_affected(
                "gateway-killed", attempt.started_at, attempt.ended_at + SETTLEMENT_SECONDS
            )
        }
        while missing := expected - {item["id"] for item in await self._list_tasks(tenant)}:
            if time.monotonic() > deadline:
                contents = [tenant.tasks[task] for task in missing]
                self._report("lost", f"{tenant.name}: {len(missing)} tasks are not listed", contents=contents)
                return
            await asyncio.sleep(0.5)

    async def _list_tasks(self, tenant: TenantCase) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        page = "/v1/tasks?limit=100"
        while page:
            body = await self._get(tenant, page)
            items += body["items"]
            page = body["next_cursor"] and f"/v1/tasks?limit=100&cursor={body['next_cursor']}"
        return items

    def _started(self, content: str) -> float:
        return min(attempt.started_at for attempt in self.attempts[content])

    def _spans_loss(self, content: str) -> bool:
        """Return whether the store was emptied between its first request and its settlement."""
        ended_at = max(attempt.ended_at for attempt in self.attempts[content]) + SETTLEMENT_SECONDS
        return self.history.epoch(self._started(content)) != self.history.epoch(ended_at)

    def _is_excused(self, content: str) -> bool:
        """Return whether the store was emptied after the submission had begun."""
        return bool(self.history.flushed_at) and self._started(content) <= self.history.flushed_at[-1]

    def _check_receipts(self, content: str, items: Sequence[Attempt]) -> None:
        """Sent again only after a refusal, at most once per attempt and account."""
        receipts = sorted(self.vendor.receipts.get(content, ()), key=lambda receipt: receipt.at)
        accounts = Counter(receipt.account for receipt in receipts)
        is_repeated = any(times > len(items) for times in accounts.values()) or any(
            earlier.reply is not Reply.REFUSED and not self._is_emptied(earlier.at, later.at)
            for earlier, later in pairwise(receipts)
        )
        if is_repeated:
            replies = [f"{receipt.account} {receipt.reply} at {self._time(receipt.at)}" for receipt in receipts]
            self._report("double", f"{content} was sent again: {replies}", at=receipts[-1].at, contents=[content])

    def _time(self, at: float) -> str:
        return f"{at - self.history.started_at:.2f} s"

    def _is_emptied(self, start: float, end: float) -> bool:
        """Return whether the store was emptied about then."""
        return any(start - SETTLEMENT_SECONDS <= flushed_at <= end for flushed_at in self.history.flushed_at)

    def _check_answers(self, content: str, items: Sequence[Attempt]) -> None:
        """Who is told that nothing was charged was not charged; who was accepted gets 201."""
        tasks, last = self.vendor.accepted(content), items[-1]
        if len({attempt.task for attempt in items if attempt.task}) > len(tasks):
            self._report("wrong answer", f"{content} got 201 too often", at=last.ended_at, contents=[content])
        for item in items:
            others = [other for other in items if other is not item and _overlap(item, other)]
            receipts = self.vendor.receipts.get(content, ())
            is_charged = any(receipt.task and item.started_at <= receipt.at <= item.ended_at for receipt in receipts)
            if (item.status, item.code) in NOT_CHARGED and is_charged and not others:
                self._report("told not charged", f"{content}: {item.code}", at=item.ended_at, contents=[content])
        receipts = self.vendor.receipts.get(content, ())
        first = items[0]
        is_plain = len(items) == len(receipts) == 1 and receipts[0].reply is Reply.ACCEPTED and first.status
        if is_plain and first.status != httpx2.codes.CREATED and not self._was_stopped(first):
            self._report(
                "wrong answer", f"{content} was accepted, but got {first.status}", at=first.ended_at, contents=[content]
            )

    def _was_stopped(self, attempt: Attempt) -> bool:
        return self.history.is_affected("gateway-", attempt.started_at, attempt.ended_at)

    async def _read_books(self, tenant: TenantCase) -> TenantReport:
        tasks: dict[str, dict[str, Any]] = {}
        for task_id in tenant.tasks:
            if found := await self._get(tenant, f"/v1/tasks/{task_id}"):
                tasks[task_id] = found
        tasks |= {item["id"]: item for item in await self._list_tasks(tenant)}
        usage = await self._get(tenant, self._usage_path)
        unknown = await self._read_submissions(tenant, [item["id"] for item in usage["unknown_submissions"]])
        refunded = await self._read_submissions(tenant, [item["submission"] for item in usage["refunds"]])
        policies = {policy["policy"]: policy for policy in (await self._get(tenant, "/v1/quota"))["policies"]}
        by_content: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for task in tasks.values():
            content = task["metadata"].get("content") or tenant.tasks.get(task["id"], "")
            by_content[content].append(task)
        return TenantReport(tasks, by_content, unknown, refunded, usage, policies)

    async def _read_submissions(self, tenant: TenantCase, ids: Sequence[str]) -> list[dict[str, Any]]:
        found = [await self._get(tenant, f"/v1/submissions/{submission}") for submission in ids]
        return [item for item in found if item]

    def _check_tasks(self, tenant: TenantCase, books: TenantReport) -> None:
        """Every accepted task can be read with its end, or is an unknown submission of its kind."""
        missing: Counter[str] = Counter()
        unknown_ids = {item["id"] for item in books.unknown}
        submissions = {attempt.submission for attempt in tenant.submitted}
        for content in {attempt.content for attempt in tenant.submitted}:
            accepted, known = self.vendor.accepted(content), books.by_content.get(content, [])
            for task in known[:1]:
                expected = {"failed" if item.fails else "succeeded" for item in accepted}
                if task["state"] not in expected:
                    self._report("wrong state", f"{task['id']} is {task['state']}, not {expected}", contents=[content])
                if accepted and not self.history.flushed_at:
                    self._check_cost(task, accepted[0])
            if content and len(known) > len(accepted):
                self._report("wrong answer", f"{content} has {len(known)} tasks", contents=[content])
            named = {attempt.submission for attempt in self.attempts[content]} & unknown_ids
            if accepted and not known and not named and not self._is_excused(content):
                missing[accepted[0].kind] += 1
        # Old routes have no metadata: a task whose caller left is known by its id only.
        without_content = Counter(task["kind"] for task in books.by_content.get("", ()))
        unknown = Counter(item["kind"] for item in books.unknown if item["id"] not in submissions)
        for kind, count in (missing - unknown - without_content).items():
            self._report("lost", f"{tenant.name}: {count} tasks of {kind} are neither readable nor unknown")

    def _check_sums(self, tenant: TenantCase, books: TenantReport) -> None:
        """Windows count accepted and unknown submissions less the refunds, and so does the usage."""
        total = books.usage["total"]
        counted = total["tasks"]["succeeded"] + total["tasks"]["failed"] + total["tasks"]["unknown"]
        charged = counted - total["refunded"]["tasks"]
        if total["charged"]["tasks"] != charged or len(books.unknown) != total["tasks"]["unknown"]:
            self._report("books", f"{tenant.name}: the usage is not consistent: {total}")
        if counted != len(books.tasks) + len(books.unknown):
            text = f"{counted} counted, {len(books.tasks)} tasks, {len(books.unknown)} unknown"
            self._report("books", f"{tenant.name}: {text}")
        self._check_windows(tenant, books)
        self._check_spending(tenant, books)
        contents = {attempt.content for attempt in tenant.submitted}
        accepted = sum(len(self.vendor.accepted(content)) for content in contents)
        sure = sum(bool(self.vendor.accepted(content)) and not self._is_excused(content) for content in contents)
        if counted < sure or len(books.tasks) > accepted:
            self._report("books", f"{tenant.name}: {counted} counted, but the vendor accepted {accepted}")

    def _check_windows(self, tenant: TenantCase, books: TenantReport) -> None:
        """Each current window counts the submissions that were reserved in it, less those refunded."""
        created = [item["created_at"] for item in (*books.tasks.values(), *books.unknown)]
        refunded = [item["created_at"] for item in books.refunded]
        for name, policy in books.policies.items():
            if policy["unit"] != "tasks":
                continue
            resets_at = policy["resets_at"] and datetime.fromisoformat(policy["resets_at"]) - timedelta(seconds=1)
            window = f"{resets_at:%Y-%m-%dT%H:%M}"[: _WINDOW_DIGITS[policy["window"]]] if resets_at else ""
            expected = sum(at.startswith(window) for at in created) - sum(at.startswith(window) for at in refunded)
            if policy["used"] != expected:
                self._report("books", f"{tenant.name}: {name} has {policy['used']} used instead of {expected}")

    def _check_spending(self, tenant: TenantCase, books: TenantReport) -> None:
        """The usage has the sums of the costs of all tasks, by basis."""
        spent = books.usage["total"]["spent"]
        for basis in ("observed", "estimated"):
            costs = [task["cost"] for task in books.tasks.values() if task["cost"] and task["cost"]["basis"] == basis]
            sums = {unit: round(sum(cost[unit] for cost in costs), 2) for unit in ("count", "money")}
            if sums != spent[basis]:
                self._report("books", f"{tenant.name}: {basis} costs are {sums}, the usage has {spent[basis]}")

    def _check_limits(self, tenant: TenantCase, books: TenantReport) -> None:
        """No window of a limit has more submissions, by the time of their reservation, nor has the total."""
        if not tenant.has_constant_limits:
            return
        contents = {task["id"]: content for content, tasks in books.by_content.items() for task in tasks}
        times = [(task["created_at"], contents[task["id"]]) for task in books.tasks.values()]
        times += [(item["created_at"], "") for item in books.unknown]
        epochs: dict[tuple[int, str, str], int] = Counter()
        for created_at, content in times:
            if self.history.flushed_at and (not content or self._spans_loss(content)):
                continue
            epoch = self.history.epoch(self._started(content)) if content else 0
            for window, key in (("minute", created_at[:16]), ("day", created_at[:10]), ("total", "")):
                epochs[epoch, window, key] += 1
        for limit in tenant.body["limits"]:
            for (_, window, key), count in epochs.items():
                if window == limit["window"] and "tasks" in limit and count > limit["tasks"]:
                    self._report("over-admitted", f"{tenant.name}: {count} tasks in {window} {key}")
        charged: Counter[tuple[int, str]] = Counter()
        for task in self._charged_tasks(tenant):
            if self._spans_loss(task.content):
                continue
            charged[self.history.epoch(self._started(task.content)), "money"] += task.money
        for limit in tenant.body["limits"]:
            if "money" in limit and any(amount > limit["money"] for amount in charged.values()):
                self._report("over-admitted", f"{tenant.name}: {charged} yuan spent of {limit['money']}")
        if tenant.body.get("spending_mode") == "count_only" and charged.total():
            self._report("over-admitted", f"{tenant.name}: {charged.total()} yuan spent instead of uses")
        self._check_active(tenant)

    def _charged_tasks(self, tenant: TenantCase) -> list[VendorTask]:
        contents = {attempt.content for attempt in tenant.submitted}
        return [task for task in self.vendor.tasks.values() if task.content in contents]

    def _check_active(self, tenant: TenantCase) -> None:
        """Count the tasks that run at the vendor at once, without those whose lease expired meanwhile."""
        if "max_active" not in tenant.body:
            return
        changes = []
        for content in {attempt.content for attempt in tenant.submitted}:
            accepted_by = [attempt for attempt in self.attempts[content] if attempt.task]
            for receipt in self.vendor.receipts.get(content, ()):
                is_sure = not any(map(self._may_be_overdue, accepted_by)) and not self.history.flushed_at
                if receipt.task and accepted_by and is_sure:
                    changes += [(receipt.at, 1), (receipt.task.ends_at, -1)]
        running = 0
        for at, change in sorted(changes):
            running += change
            if running > tenant.body["max_active"]:
                self._report("over-admitted", f"{tenant.name}: {running} tasks run at once", at=at)
                return

    def _check_cost(self, task: Mapping[str, Any], charged: VendorTask) -> None:
        """An observed cost is what the vendor charged, on accounts that nobody else uses and nobody tops up."""
        cost = task["cost"]
        if not cost or cost["basis"] != "observed" or charged.account.key not in EXCLUSIVE_ACCOUNTS:
            return
        expected = (0, 0) if charged.is_refunded else (charged.count, charged.money)
        if (cost["count"], cost["money"]) != expected:
            self._report("books", f"{task['id']} cost {expected}, not {cost}", contents=[charged.content])

    def _find_undelivered(self) -> list[str]:
        """Return the contents of ended tasks without a confirmed event."""
        confirmed = {item.event["data"].get("id") for item in self.receiver.confirmed}
        return [
            content
            for tenant in self.tenants
            for task, content in tenant.tasks.items()
            if task not in confirmed and not self._is_excused(content)
        ]

    def _find_unreported(self, tenant: TenantCase, policies: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the thresholds that a tenant has reached without a confirmed event."""
        told = {key[1:] for key in self._threshold_ids() if key[0] == tenant.name}
        percentages = {f"{limit['window']}-": limit.get("warn_at", ()) for limit in tenant.body.get("limits", ())}
        return [
            f"{tenant.name}: {percent}% of {policy['policy']}"
            for policy in policies
            for window, listed in percentages.items()
            for percent in listed
            if policy["policy"].startswith(window)
            and policy["used"] * 100 >= policy["limit"] * percent
            and (policy["policy"], percent) not in told
        ]

    def _threshold_ids(self) -> dict[tuple[str, str, int], set[str]]:
        """Return the ids of confirmed events by tenant, policy and percentage."""
        ids: dict[tuple[str, str, int], set[str]] = defaultdict(set)
        for item in self.receiver.confirmed:
            if item.event["type"] == "quota.threshold":
                data = item.event["data"]
                ids[data["tenant"], data["policy"], data["threshold"]].add(item.headers["webhook-id"])
        return ids

    def _check_webhooks(self) -> None:
        """Every end, and every threshold of a limit in total, is delivered with a valid signature, under one id."""
        for threshold, events in self._threshold_ids().items():
            if len(events) > 1:
                self._report("webhook", f"{threshold} has {len(events)} events")
        secrets = {tenant.name: tenant.webhook_secret for tenant in self.tenants}
        ids: dict[str, set[str]] = defaultdict(set)
        contents = {task: content for tenant in self.tenants for task, content in tenant.tasks.items()}
        for item in self.receiver.confirmed:
            if not item.is_signed_with(secrets[item.path.strip("/")]):
                self._report("webhook", f"a wrong signature of {item.headers['webhook-id']}")
            if item.event["type"] == "quota.threshold":
                continue
            task = item.event["data"]
            ids[task["id"]].add(item.headers["webhook-id"])
            if item.event["type"] != f"task.{task['state']}":
                self._report("webhook", f"{item.event['type']} of {task['id']}, which is {task['state']}")
        for task, found in ids.items():
            if len(found) > 1 and not (task in contents and self._is_excused(contents[task])):
                self._report("webhook", f"{task} has {len(found)} events", contents=[contents.get(task, "")])
        for content in self._find_undelivered():
            self._report("webhook", f"the end of {content} was not delivered", contents=[content])


def _overlap(first: Attempt, second: Attempt) -> bool:
    return first.started_at <= second.ended_at and second.started_at <= first.ended_at
