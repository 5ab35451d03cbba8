"""The numbers of BUDGET.md: its examples run on a gateway, with the command that the page names."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.behaviour.gateway_fixture import USER_KEY
from tests.behaviour.requests import expect_json, expect_problem, read_policies, submit_and_lose_response
from tests.behaviour.webhook_receiver import WebhookReceiver, run_receiver
from tests.cli.conftest import Shell

PAGE = (Path(__file__).parents[2] / "deploy" / "BUDGET.md").read_text("utf-8")
NOON = datetime(2027, 3, 15, 12, tzinfo=UTC)
"""The time of all examples."""


def read_table(first_column: str) -> list[list[str]]:
    """Return the rows of the table whose first column has this heading."""
    (table,) = re.findall(rf"^\| {re.escape(first_column)} \|.*\n\|[-:| ]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def yuan(amount: float) -> str:
    return f"{amount:g}"


def mask(report: str) -> list[str]:
    """Return the lines of a report in any order, without ids and times, which differ."""
    return sorted(re.sub(r"\b[0-9a-f]{32}\b|T12:[0-9:]{5}Z", "*", report).splitlines())


@pytest.fixture
async def receiver() -> AsyncIterator[WebhookReceiver]:
    async with run_receiver() as webhook_receiver:
        yield webhook_receiver


@pytest.fixture(autouse=True)
async def set_time(shell: Shell) -> None:
    """Set the clock, and forget the account `main`, so that nothing is known of its balance."""
    now = datetime.fromisoformat(expect_json(await shell.gateway.call("GET", "/v1/usage"))["to"]).replace(tzinfo=UTC)
    await shell.gateway.advance((NOON - now).total_seconds() - 12 * 3_600)


async def submit(shell: Shell, kind: str, token: str | None = None) -> dict[str, Any]:
    await shell.gateway.advance(0.001)
    return expect_json(await shell.gateway.submit(kind, token=token), 201)


async def finish(shell: Shell, task: dict[str, Any]) -> str:
    """Wait for the end of a task; return its cost as the page has it."""
    cost = (await shell.gateway.wait_for_task(task["id"]))["cost"]
    amount = f"{yuan(cost['money'])} yuan" if cost["money"] else f"{cost['count']} use"
    return f"{amount}, {cost['basis']}"


async def test_month_of_a_tenant(shell: Shell, receiver: WebhookReceiver) -> None:
    """Walk through a month; the report at its end has all of it."""
    gateway, rows = shell.gateway, []
    sandbox = gateway.upstream
    await sandbox.set_balance(4, 100)
    await shell.run("account", "update", "main", "--max-price", "upscale=3")
    hook = ("--webhook-url", receiver.url, "--webhook-allow", receiver.network)
    await shell.run("tenant", "update", "shop", "--limit", "month:tasks=20,money=12,warn_at=50/90", *hook)

    async def record(text: str, *costs: str) -> None:
        await gateway.services.threshold_reporter.report_reached()
        sent = len(receiver.requests)
        await gateway.deliver_due_webhooks()
        events = [request.event for request in receiver.requests[sent:]]
        warned = [event["data"]["threshold"] for event in events if event["type"] == "quota.threshold"]
        policies = await read_policies(gateway)
        tasks, money = policies["month-tasks"], policies["month-money"]
        figures = [money[name] for name in ("used", "reserved", "remaining", "overrun")]
        warnings = ", ".join(f"{percent} %" for percent in warned)
        rows.append([text, "; ".join(costs), str(tasks["used"]), *map(yuan, figures), warnings])

    await record("*vectorize*, the first task ever", await finish(shell, await submit(shell, "vectorize")))
    await record("*vectorize*, alone", await finish(shell, await submit(shell, "vectorize")))
    first, second = [await submit(shell, "vectorize") for _ in range(2)]
    await record("two *vectorize* at once", await finish(shell, first), await finish(shell, second))
    task = await submit(shell, "upscale")
    await record("*upscale*, while it runs")
    await record("*upscale*, at its end", await finish(shell, task))
    await record("*vectorize*", await finish(shell, await submit(shell, "vectorize")))
    await gateway.advance(0.001)
    unknown = await submit_and_lose_response(gateway, "upscale")
    await record("*upscale*, the response is lost")
    await shell.run("refund", unknown, "--reason", "The vendor did not charge it.")
    await record("its refund")
    await sandbox.fail_next_task()
    failed = await submit(shell, "vectorize")
    await record("*vectorize*, which fails", await finish(shell, failed))
    await shell.run("refund", failed["id"], "--reason", "Goodwill.")
    await record("its refund")
    await sandbox.update_behaviour(prices={"vector": 9}, faults=())
    await record("*vectorize*, now at 9 yuan", await finish(shell, await submit(shell, "vectorize")))
    expect_problem(await gateway.submit("vectorize"), 429, "quota-exceeded")
    await record("*vectorize*, refused with 429")
    assert read_table("what happens") == rows

    printed = (await shell.run("report", "--month", "2027-03")).stdout
    (shown,) = re.findall(r"^```text\n(From .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert mask(printed) == mask(shown)

    total, left = (await shell.run_json("report"))["total"], (await sandbox.control.list_accounts())[USER_KEY]
    booked = [total["charged"][unit] + total["refunded"][unit] for unit in ("count", "money")]
    assert booked == [4 - left.count, 100 - left.money], "the balance fell by what is charged and refunded"


async def open_account(shell: Shell, name: str, count: int, money: int, **settings: Any) -> str:
    """Create an account whose balance is known, and a tenant for it; return its token."""
    gateway, key = shell.gateway, f"key-of-{name}"
    await gateway.upstream.set_balance(count + 1, money, key)
    mode = settings.pop("spending_mode")
    await gateway.call_admin("PUT", f"/accounts/{name}", json={"user_key": key})
    await gateway.put_tenant(name, accounts=[name], spending_mode=mode)
    token = await gateway.new_token(name)
    await gateway.wait_for_task((await submit(shell, "upscale", token))["id"], token=token)
    (await gateway.call_admin("PATCH", f"/accounts/{name}", json=settings)).raise_for_status()
    return token


async def test_floors(shell: Shell) -> None:
    """So many tasks, one after another, are accepted until the floors."""
    for number, (count, money, floor_count, floor_money, price, mode, expected) in enumerate(read_table("uses left")):
        settings = {
            "floor_count": int(floor_count),
            "floor_money": float(floor_money),
            "max_price": {"upscale": float(price)} if price != "-" else {},
            "spending_mode": mode.strip("`"),
        }
        token = await open_account(shell, f"floor-{number}", int(count), int(money), **settings)
        accepted = 0
        while (response := await shell.gateway.submit("upscale", token=token)).status_code == 201:
            await shell.gateway.wait_for_task(response.json()["id"], token=token)
            await shell.gateway.advance(0.001)
            accepted += 1
        expect_problem(response, 402, "balance-exhausted")
        assert str(accepted) == expected, number


async def test_holds(shell: Shell) -> None:
    """A running task holds so much of a limit of 50 yuan."""
    for number, (_, count, price, observed, expected) in enumerate(read_table("what is known")):
        settings = {"max_price": {"upscale": float(price)} if price != "-" else {}, "spending_mode": "count_then_money"}
        name = f"hold-{number}"
        token = await open_account(shell, name, int(count), 100, **settings)
        if observed != "-":
            await shell.gateway.wait_for_task((await submit(shell, "upscale", token))["id"], token=token)
        limits = [{"window": "day", "money": 50 + (float(observed) if observed != "-" else 0)}]
        await shell.gateway.call_admin("PATCH", f"/tenants/{name}", json={"limits": limits})
        await submit(shell, "upscale", token)
        (policy,) = expect_json(await shell.gateway.call("GET", "/v1/quota", token=token))["policies"]
        assert yuan(policy["reserved"]) == expected, number
