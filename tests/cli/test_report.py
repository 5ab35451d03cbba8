"""The report of a month's spending has exactly what the ledger has booked."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from service.api.schemas import flatten
from tests.behaviour.requests import expect_json, submit_and_lose_response
from tests.cli.conftest import Shell

MONTH_LIMIT = [{"window": "month", "tasks": 50, "money": 8}]


async def run_task(shell: Shell, kind: str, token: str | None = None) -> str:
    await shell.gateway.advance(0.001)
    task = expect_json(await shell.gateway.submit(kind, token=token), 201)
    return str((await shell.gateway.wait_for_task(task["id"], token=token))["id"])


async def spend(shell: Shell) -> None:
    """Let three tenants, one of which is deleted, spend uses and money, by every basis and outcome."""
    gateway = shell.gateway
    await gateway.upstream.set_balance(4, 200)
    tokens = {}
    for name in ("shop", "press", "former"):
        await gateway.put_tenant(name, limits=MONTH_LIMIT)
        tokens[name] = await gateway.new_token(name)
    await run_task(shell, "seamless", tokens["former"])  # estimated, since nothing was known of the balance
    await gateway.call_admin("DELETE", "/tenants/former")
    first = await run_task(shell, "vectorize", tokens["press"])
    await shell.run("refund", first, "--reason", "=a use")
    both = [expect_json(await gateway.submit("upscale", token=tokens[name]), 201) for name in ("shop", "press")]
    for task, name in zip(both, ("shop", "press"), strict=True):
        await gateway.wait_for_task(task["id"], token=tokens[name])
    for _ in range(2):
        await run_task(shell, "vectorize")
    await gateway.upstream.fail_next_task()
    await shell.run("refund", await run_task(shell, "vectorize"), "--reason", "it failed")
    await gateway.upstream.update_behaviour(prices={"vector": 7})
    await run_task(shell, "vectorize")  # at a risen price, and so beyond the limit
    await gateway.put_tenant("press", limits=[{"window": "month", "tasks": 50, "money": 40}])
    await gateway.advance(0.001)
    gateway.token = tokens["press"]
    unknown = await submit_and_lose_response(gateway, "vectorize")
    await submit_and_lose_response(gateway, "upscale")
    await shell.run("refund", unknown, "--reason", "not charged")
    await gateway.submit("seamless")  # runs still


def sum_up(items: list[dict[str, Any]], *path: str) -> dict[str, float]:
    """Return the sum of a number by tenant, in uses, tasks or fen."""
    sums: dict[str, float] = defaultdict(float)
    for item in items:
        value: Any = item
        for name in path:
            value = value[name]
        sums[item["tenant"]] += round(value * 100) if path[-1] in {"money", "overrun"} else value
    return dict(sums)


async def test_report_has_what_the_ledger_booked(shell: Shell, tmp_path: Path) -> None:
    await spend(shell)
    file = tmp_path / "spending.csv"
    printed = await shell.run_table("report", "--output", str(file))
    usage = await shell.run_json("report")
    assert usage == await shell.get_admin("/usage?interval=month&group_by=tenant,kind")
    items, total = usage["items"], usage["total"]
    for name, prefix in (("shop", "month"), ("press", "month")):
        policies = {item["policy"]: item for item in (await shell.get_admin(f"/tenants/{name}"))["policies"]}
        tasks, money = policies[f"{prefix}-tasks"], policies[f"{prefix}-money"]
        assert sum_up(items, "charged", "tasks")[name] == tasks["used"]
        assert sum_up(items, "charged", "money")[name] == round(money["used"] * 100)
        assert sum_up(items, "overrun")[name] == round(money["overrun"] * 100)
    for path in (
        *(("spent", basis, unit) for basis in ("observed", "estimated") for unit in ("count", "money")),
        *(("spent", "unknown", "money"), ("tasks", "unknown"), ("refunded", "tasks"), ("refunded", "count")),
        *(("refunded", "money"), ("overrun",), ("tasks", "failed"), ("tasks", "running")),
    ):
        value: Any = total
        for part in path:
            value = value[part]
        scale = 100 if path[-1] in {"money", "overrun"} else 1
        assert sum(sum_up(items, *path).values()) == round(value * scale) > 0, path

    rows = list(csv.DictReader(io.StringIO(file.read_text(), newline="")))
    assert rows == [
        {name: "" if value is None else str(value) for name, value in flatten(item).items()} for item in items
    ]
    assert (await shell.run("report", "--csv")).stdout_bytes == file.read_bytes()
    of_server = await shell.run("usage", "--interval", "month", "--csv")
    assert of_server.stdout_bytes == file.read_bytes()

    head, *lines = printed[2 : printed.index([], 2)]
    charged = head.index("YUAN CHARGED")
    sums = {line[0]: round(float(line[charged]) * 100) for line in lines if line[1] == "all"}
    assert sums == {name: amount for name, amount in sum_up(items, "charged", "money").items() if name != "former"}
    kinds = [line[:2] for line in lines]
    listed = [[item["tenant"], item["kind"]] for item in items]
    assert [line for line in kinds if line[1] != "all" and line[0] != "total"] == listed
    assert [line[0] for line in kinds if line[1] == "all" or line[0] == "total"] == ["press", "shop", "total"]
    only = await shell.run_json("report", "--tenant", "press")
    assert only["items"] == [item for item in items if item["tenant"] == "press"]


async def test_report_of_other_months(shell: Shell) -> None:
    today = date.fromisoformat((await shell.run_json("report"))["to"])
    former = today.replace(day=1) - timedelta(days=1)
    usage = await shell.run_json("report", "--month", f"{former:%Y-%m}")
    assert (usage["from"], usage["to"], usage["items"]) == (str(former.replace(day=1)), str(former), [])
    assert len(await shell.run_table("report", "--month", f"{former:%Y-%m}")) == 4
    error = (await shell.run("report", "--month", "2020-02", code=1)).stderr
    assert error.startswith("Invalid options:\n  from: ")
    assert (await shell.run("report", "--output", "/nowhere/spending.csv", code=1)).stdout == ""
