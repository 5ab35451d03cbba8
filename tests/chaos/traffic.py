"""Seeded random traffic of tenants and operators, and what may be answered to it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tests.chaos.gateways import Gateway, Gateways
from tests.chaos.history import Attempt, History
from tests.chaos.servers import wait_for
from tests.chaos.vendor import KINDS, PRICES, Vendor, VendorAccount
from tests.support.images import draw_image, encode_image

CALLERS = 16
TIMEOUT_SECONDS = 120.0
CALLER_FAULTS = ("caller-leaves-upload", "caller-leaves-answer", "caller-leaves-wait")
OPERATOR_ACTIONS = ("refund", "policy-change", "top-up", "foreign-spending")
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "upscale": {"scale": "2"},
    "vectorize": {"colors": "4"},
    "seamless": {"fit": "0.4"},
}
_LEGACY_ROUTES = {kind: route for route, kind in KINDS.items()}
_REFUSALS = {
    (402, "balance-exhausted"),
    (403, "tenant-read-only"),
    (429, "quota-exceeded"),
    (429, "rate-limited"),
    (429, "too-many-active-tasks"),
    (502, "upstream-rejected"),
    (503, "ledger-unavailable"),
    (503, "upstream-unavailable"),
    (503, "account-misconfigured"),
    (503, "overloaded"),
}
NOT_CHARGED = frozenset(_REFUSALS)
"""Answers to a submission which say that it cost nothing."""
_SUBMITTED = NOT_CHARGED | {(201, ""), (409, "idempotency-in-flight"), (504, "submission-unknown")}
_READ = {(200, ""), (503, "ledger-unavailable"), (503, "upstream-unavailable"), (503, "overloaded")}
_FILE = _READ | {(502, "upstream-invalid-response"), (404, "not-found")}
_FOREIGN = {(404, "not-found"), (503, "ledger-unavailable")}
_STATES = ["queued", "running", "succeeded"]


@dataclass(eq=False)
class TenantCase:
    """A tenant with its settings, and which of its promises are exact."""

    name: str
    body: dict[str, Any]
    token: str = ""
    webhook_secret: str = ""
    has_constant_limits: bool = True
    tasks: dict[str, str] = field(default_factory=dict)  # ids of tasks with their content
    submitted: list[Attempt] = field(default_factory=list)


def describe_accounts() -> dict[str, VendorAccount]:
    """Return the accounts: rich ones, one without uses, one that charges at the end, small ones, one shared."""
    return {
        account.key: account
        for account in (
            VendorAccount("rich", count=10**6),
            VendorAccount("capped", count=10**6, charges_at_end=True),
            VendorAccount("paid", money=10**6),
            VendorAccount("prepaid", count=5, money=1_000),
            VendorAccount("small", count=20),
            VendorAccount("reserve", count=10**6),
            VendorAccount("shared", count=10**6, money=1_000, refunds_failures=True),
        )
    }


def describe_tenants() -> list[TenantCase]:
    """Return the tenants; the windows of `steady` have limits that it does not reach."""
    all_windows = [{"window": name, "tasks": 10**6} for name in ("minute", "hour", "day", "month", "total")]
    return [
        TenantCase("steady", {"accounts": ["rich"], "limits": all_windows, "max_active": 1_000}),
        TenantCase(
            "capped",
            {
                "accounts": ["capped"],
                "limits": [{"window": "minute", "tasks": 8}, {"window": "total", "tasks": 40, "warn_at": [50]}],
                "max_active": 2,
            },
        ),
        TenantCase(
            "budget", {"accounts": ["paid"], "limits": [{"window": "total", "money": 120, "warn_at": [25, 50]}]}
        ),
        TenantCase("prepaid", {"accounts": ["prepaid"], "limits": all_windows, "spending_mode": "count_only"}),
        TenantCase("failover", {"accounts": ["small", "unreachable", "reserve"], "limits": all_windows}),
        TenantCase("changing", {"accounts": ["shared"], "limits": all_windows}, has_constant_limits=False),
    ]


@dataclass
class Traffic:
    """The callers of all tenants until `is_over`, and the operators."""

    history: History
    vendor: Vendor
    gateways: Gateways
    tenants: list[TenantCase]
    seed: int
    faults: frozenset[str]
    client: httpx2.AsyncClient
    is_over: bool = False

    async def set_up(self, receiver_url: str, unreachable_url: str) -> None:
        """Create accounts, tenants and tokens."""
        port = urlsplit(receiver_url).port
        for key in [*self.vendor.accounts, "unreachable"]:
            url = self.vendor.url if key in self.vendor.accounts else unreachable_url
            body = {"user_key": key, "base_url": url, "max_price": PRICES}
            (await self.gateways.call_admin("PUT", f"/accounts/{key}", json=body)).raise_for_status()
        for tenant in self.tenants:
            webhook = {"url": f"{receiver_url}/{tenant.name}", "allow": [f"127.0.0.0/8:{port}"]}
            response = await self.gateways.call_admin(
                "PUT", f"/tenants/{tenant.name}", json=tenant.body | {"webhook": webhook}
            )
            response.raise_for_status()
            tenant.webhook_secret = response.json()["webhook"]["secret"]
            tenant.body["webhook"] = webhook
            token = await self.gateways.call_admin("POST", f"/tenants/{tenant.name}/tokens")
            tenant.token = token.json()["token"]
        for gateway in self.gateways.members:
            if gateway.serves:
                await wait_for(partial(self._has_tokens, gateway.url), "news of the tokens")

    async def _has_tokens(self, url: str) -> bool:
        headers = {"Authorization": f"Bearer {self.tenants[-1].token}"}
        return (await self.client.get(f"{url}/v1/quota", headers=headers)).is_success

    async def run(self, phase: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(self._call_repeatedly(random.Random(f"{self.seed} {phase} caller {number}")))
            group.create_task(self._operate(random.Random(f"{self.seed} {phase} operator")))

    async def _call_repeatedly(self, randomness: random.Random) -> None:
        actions: list[tuple[int, Callable[[TenantCase, random.Random], Coroutine[Any, Any, None]]]] = [
            (40, self._submit_once),
            (8, self._submit_copies),
            (5, self._repeat),
            (8, self._submit_and_wait),
            (8, self._submit_legacy),
            (12, self._leave),
            (8, self._stream),
            (12, self._read),
            (6, self._read_reports),
            (5, self._download),
            (3, self._read_foreign),
        ]
        weights, functions = zip(*actions, strict=True)
        while not self.is_over:
            (act,) = randomness.choices(functions, weights)
            (tenant,) = randomness.choices(self.tenants, [6, 2, 2, 2, 2, 2])
            await act(tenant, randomness)
            await asyncio.sleep(randomness.expovariate(4))

    def _pick_gateway(self, randomness: random.Random) -> Gateway:
        serving = [gateway for gateway in self.gateways.members if gateway.serves]
        return randomness.choice(serving or [self.gateways.members[0]])

    async def request(
        self,
        tenant: TenantCase,
        randomness: random.Random,
        method: str,
        path: str,
        allowed: set[tuple[int, str]] | frozenset[tuple[int, str]],
        *,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> httpx2.Response | None:
        """Send a request to any gateway; return None if the connection broke. Anything not allowed is a violation."""
        gateway = self._pick_gateway(randomness)
        self.history.requests += 1
        started_at = time.monotonic()
        fields = {"Authorization": f"Bearer {tenant.token}"} | dict(headers or {})
        try:
            response = await self.client.request(method, gateway.url + path, headers=fields, **more)
        except httpx2.TransportError as error:
            is_cut = self.history.is_affected("file-reset", started_at, time.monotonic()) and "artifacts" in path
            if not is_cut and not self.history.is_affected("gateway-", started_at, time.monotonic()):
                self.history.add_violation("no answer", f"{method} {path}: {error!r}")
            return None
        status = response.status_code, read_code(response)
        # Of a task that the store lost, the vendor's "not found or of unknown state" is all that is known.
        is_lost = status == (404, "not-found") and bool(self.history.flushed_at)
        # A gateway that starts at an emptied store knows no token until another one has written them again.
        is_lost |= status == (401, "unauthenticated") and self.history.is_affected(
            "store-flushed", started_at, time.monotonic()
        )
        if status not in allowed and not is_lost:
            self.history.add_violation("wrong answer", f"{method} {path}: {status[0]} {response.text[:300]}")
        return response

    def _new_attempt(self, tenant: TenantCase, randomness: random.Random, *, key: bool = False) -> Attempt:
        content = f"{randomness.getrandbits(64):016x}"
        kind = randomness.choice([*KINDS.values()])
        return Attempt(content, tenant.name, kind, f"key-{content}" if key else "")

    async def _submit(
        self, tenant: TenantCase, randomness: random.Random, attempt: Attempt, *, prefer: str = "", leave: float = 0
    ) -> None:
        """Send a submission, and record its outcome; with `leave` the caller is gone after so many seconds."""
        headers = {"Idempotency-Key": f'"{attempt.key}"'} if attempt.key else {}
        headers |= {"Prefer": prefer} if prefer else {}
        self.history.attempts.append(attempt)
        tenant.submitted.append(attempt)
        with suppress(TimeoutError):
            async with asyncio.timeout(leave or None):
                response = await self.request(
                    tenant,
                    randomness,
                    "POST",
                    f"/v1/tasks/{attempt.kind}",
                    _SUBMITTED,
                    headers=headers,
                    data={**_OPTIONS.get(attempt.kind, {}), "metadata": json.dumps({"content": attempt.content})},
                    files={"image": ("image.jpg", make_image(attempt.content), "image/jpeg")},
                )
                if response is not None:
                    self._record(tenant, attempt, response)
        attempt.ended_at = time.monotonic()

    def _record(self, tenant: TenantCase, attempt: Attempt, response: httpx2.Response) -> None:
        attempt.status, attempt.code = response.status_code, read_code(response)
        if attempt.status == httpx2.codes.CREATED:
            attempt.task = response.json()["id"]
            tenant.tasks[attempt.task] = attempt.content
        elif attempt.code:
            attempt.submission = response.json().get("submission_id", "")

    async def _submit_once(self, tenant: TenantCase, randomness: random.Random) -> None:
        await self._submit(tenant, randomness, self._new_attempt(tenant, randomness))

    async def _submit_and_wait(self, tenant: TenantCase, randomness: random.Random) -> None:
        await self._submit(tenant, randomness, self._new_attempt(tenant, randomness), prefer="wait=5")

    async def _submit_copies(self, tenant: TenantCase, randomness: random.Random) -> None:
        first = self._new_attempt(tenant, randomness, key=True)
        await asyncio.gather(*(self._submit_copy(tenant, randomness, first) for _ in range(randomness.randint(1, 4))))

    async def _repeat(self, tenant: TenantCase, randomness: random.Random) -> None:
        """Repeat an earlier submission under its key."""
        if keyed := [attempt for attempt in tenant.submitted if attempt.key]:
            await self._submit_copy(tenant, randomness, randomness.choice(keyed))

    async def _submit_copy(self, tenant: TenantCase, randomness: random.Random, earlier: Attempt) -> None:
        """Submit under a key, again after answers without an outcome, as callers do."""
        for _ in range(4):
            attempt = Attempt(earlier.content, earlier.tenant, earlier.kind, earlier.key)
            await self._submit(tenant, randomness, attempt)
            if attempt.status not in {0, 409, 503, 504}:
                return
            await asyncio.sleep(randomness.uniform(0.1, 1))

    async def _submit_legacy(self, tenant: TenantCase, randomness: random.Random) -> None:
        attempt = self._new_attempt(tenant, randomness)
        self.history.attempts.append(attempt)
        tenant.submitted.append(attempt)
        image = make_image(attempt.content)
        response = await self.request(
            tenant,
            randomness,
            "POST",
            f"/api/{_LEGACY_ROUTES[attempt.kind]}",
            {(200, "")},
            data={"user_key": tenant.token},
            files={"input_image": ("image.jpg", image, "image/jpeg")},
        )
        attempt.ended_at = time.monotonic()
        if response is None or not response.is_success:
            return
        answer = response.json()
        if answer["err_code"] == 0:
            attempt.status, attempt.task = 201, answer["task_id"]
            tenant.tasks[attempt.task] = attempt.content
        elif unknown := re.search(r"submission_id ([0-9a-f]{32})", answer["err_msg"]):
            attempt.status, attempt.code, attempt.submission = 504, "submission-unknown", unknown[1]
        else:
            attempt.status, attempt.code = 502, "upstream-rejected"

    async def _leave(self, tenant: TenantCase, randomness: random.Random) -> None:
        """Submit, or wait, and leave before the end."""
        name = randomness.choice(CALLER_FAULTS)
        if name not in self.faults:
            return
        if name == "caller-leaves-wait":
            if task := self._newest_task(tenant):
                self.history.add_fault(name, tenant.tasks[task], 1)
                await self._wait(tenant, randomness, task, leave=randomness.uniform(0.01, 1))
            return
        attempt = self._new_attempt(tenant, randomness, key=randomness.random() < 0.3)
        self.history.add_fault(name, attempt.content, 1)
        if name == "caller-leaves-answer":
            await self._submit(tenant, randomness, attempt, leave=randomness.uniform(0.01, 0.3))
            return
        self.history.attempts.append(attempt)
        tenant.submitted.append(attempt)
        await self._upload_half(tenant, attempt, randomness)
        attempt.ended_at = time.monotonic()

    async def _upload_half(self, tenant: TenantCase, attempt: Attempt, randomness: random.Random) -> None:
        address = urlsplit(self._pick_gateway(randomness).url)
        form = httpx2.Request(
            "POST",
            f"http://{address.netloc}/v1/tasks/{attempt.kind}",
            headers={"Authorization": f"Bearer {tenant.token}"},
            files={"image": ("image.jpg", make_image(attempt.content), "image/jpeg")},
        )
        head = f"POST {form.url.path} HTTP/1.1\r\n" + "".join(
            f"{name}: {text}\r\n" for name, text in form.headers.items()
        )
        body = form.read()
        with suppress(OSError):
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(head.encode() + b"\r\n" + body[: randomness.randrange(len(body))])
            await asyncio.sleep(randomness.uniform(0, 0.2))
            writer.transport.abort()

    def _newest_task(self, tenant: TenantCase) -> str:
        """Return the task that most likely runs still."""
        return next(reversed(tenant.tasks), "")

    def _pick_task(self, tenant: TenantCase, randomness: random.Random) -> str:
        tasks = list(tenant.tasks)
        return randomness.choice(tasks[-30:]) if tasks else ""

    async def _wait(self, tenant: TenantCase, randomness: random.Random, task: str, *, leave: float = 0) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(leave or None):
                await self.request(tenant, randomness, "GET", f"/v1/tasks/{task}", _READ, headers={"Prefer": "wait=3"})

    async def _read(self, tenant: TenantCase, randomness: random.Random) -> None:
        if not (task := self._pick_task(tenant, randomness)):
            return
        if randomness.random() < 0.3:
            await self._wait(tenant, randomness, task)
            return
        await self.request(tenant, randomness, "GET", f"/v1/tasks/{task}", _READ)

    async def _read_reports(self, tenant: TenantCase, randomness: random.Random) -> None:
        path = randomness.choice(["/v1/tasks?limit=20", "/v1/tasks?state=failed", "/v1/quota", "/v1/usage"])
        await self.request(tenant, randomness, "GET", path, _READ)

    async def _read_foreign(self, tenant: TenantCase, randomness: random.Random) -> None:
        others = [task for other in self.tenants if other is not tenant for task in list(other.tasks)[-5:]]
        if others:
            path = f"/v1/tasks/{randomness.choice(others)}"
            await self.request(tenant, randomness, "GET", path, _FOREIGN)

    async def _download(self, tenant: TenantCase, randomness: random.Random) -> None:
        if task := self._pick_task(tenant, randomness):
            with suppress(httpx2.StreamError):
                await self.request(tenant, randomness, "GET", f"/v1/tasks/{task}/artifacts/image", _FILE)

    async def _stream(self, tenant: TenantCase, randomness: random.Random) -> None:
        """Read events until the end, or the end of the connection; states never go back."""
        if not (task := self._newest_task(tenant)):
            return
        self.history.requests += 1
        gateway, states, started_at = self._pick_gateway(randomness), [], time.monotonic()
        headers = {"Authorization": f"Bearer {tenant.token}"}
        with suppress(httpx2.TransportError, TimeoutError):
            async with (
                asyncio.timeout(10),
                self.client.stream("GET", f"{gateway.url}/v1/tasks/{task}/events", headers=headers) as response,
            ):
                if response.is_success:
                    async for state in _read_states(response):
                        states.append(state)  # noqa: PERF401 - kept if the connection breaks
                elif response.status_code != httpx2.codes.SERVICE_UNAVAILABLE and not self.history.flushed_at:
                    self.history.add_violation("wrong answer", f"events of {task}: {response.status_code}")
        known = [_STATES.index(state) if state in _STATES else len(_STATES) for state in states]
        # Without its store a gateway shows what the vendor says, which the store may not know yet.
        if known != sorted(known) and not self.history.is_cut_off(started_at, time.monotonic()):
            self.history.add_violation("wrong answer", f"events of {task}: {states}")

    async def _operate(self, randomness: random.Random) -> None:
        """Refund, change a policy, top up, and spend elsewhere, in turn at random."""
        while not self.is_over:
            action = randomness.choice([name for name in OPERATOR_ACTIONS if name in self.faults] or [""])
            if action:
                self.history.add_fault(action)
            if action == "refund":
                await self._refund(randomness)
            elif action == "policy-change":
                await self._change_policy(randomness)
            elif action == "top-up":
                for key in ("prepaid", "small"):
                    self.vendor.accounts[key].count += randomness.randint(1, 8)
            elif action == "foreign-spending":
                self.vendor.accounts["shared"].spend_elsewhere()
            await asyncio.sleep(randomness.expovariate(1))

    async def _refund(self, randomness: random.Random) -> None:
        (tenant,) = [tenant for tenant in self.tenants if tenant.name == "changing"]
        if task := self._pick_task(tenant, randomness):
            response = await self.gateways.call_admin("POST", "/refunds", json={"task": task, "reason": "chaos"})
            if response.status_code not in {200, 201, 404, 409}:
                self.history.add_violation("wrong answer", f"refund: {response.status_code} {response.text[:300]}")

    async def _change_policy(self, randomness: random.Random) -> None:
        (tenant,) = [tenant for tenant in self.tenants if tenant.name == "changing"]
        body = tenant.body | {
            "max_active": randomness.choice([None, 2, 50]),
            "state": randomness.choice(["active", "active", "active", "read-only"]),
            "limits": [{"window": "minute", "tasks": randomness.choice([1, 5, 1_000])}, *tenant.body["limits"][1:]],
        }
        response = await self.gateways.call_admin("PUT", f"/tenants/{tenant.name}", json=body)
        if response.status_code not in {200, 201}:
            self.history.add_violation("wrong answer", f"policy: {response.status_code} {response.text[:300]}")


def read_code(response: httpx2.Response) -> str:
    """Return the code of a problem, or an empty one."""
    is_problem = response.headers.get("content-type", "") == "application/problem+json"
    return str(response.json()["code"]) if is_problem else ""


def make_image(content: str) -> bytes:
    """Return a small JPEG with the marker of the submission, and with some ballast, so that it takes several reads."""
    ballast = random.Random(content).randbytes(random.Random(content).randrange(60_000))
    return encode_image(draw_image(), "JPEG", comment=f"content:{content}".encode() + ballast)


async def _read_states(response: httpx2.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))["state"]
