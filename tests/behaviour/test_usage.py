"""Usage reports match the windows; submissions as shown to tenants and operators."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

import pytest
from httpx2 import Response

from service.usecases.ports import SubmitOutcome
from tests.behaviour.balance_harness import PRICE_YUAN, open_balance_harness
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway
from tests.behaviour.requests import (
    UNREACHABLE_POLICIES,
    advance_to_next_window,
    expect_invalid,
    expect_json,
    expect_problem,
    post_refund,
    read_all_usage,
    read_charged_today,
    read_submission,
    read_usage,
    read_windows,
    recover_task,
    run_task,
    submission_id_of,
    submit_and_lose_response,
    use_unreachable_account,
)
from tests.support.valkey import Valkey

PATHS = ("/v1/usage", "/admin/v1/usage")


def count_outcomes(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, int]]:
    """Return non-zero submission counts by period, kind and outcome."""
    return {
        (item["period"], item["kind"]): {name: number for name, number in item["tasks"].items() if number}
        for item in report["items"]
    }


async def request_media_type(gateway: RunningGateway, path: str, accept: str) -> Response:
    """Request a media type from the port that serves the path."""
    port, token = (gateway.ops_url, ADMIN_TOKEN) if path.startswith("/admin/") else (gateway.url, gateway.token)
    return await gateway.http.get(port + path, headers={"Authorization": f"Bearer {token}", "Accept": accept})


def flatten_item(item: Mapping[str, Any]) -> dict[str, str]:
    """Flatten an item as its CSV row must be."""
    flat: dict[str, str] = {}
    for name, value in item.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{inner}": entry for inner, entry in flatten_item(value).items()}
        else:
            flat[name] = "" if value is None else str(value)
    return flat


async def test_every_outcome_is_counted_once(gateway: RunningGateway) -> None:
    assert (await read_usage(gateway))["items"] == []
    today = (await read_usage(gateway))["to"]
    await run_task(gateway)
    await gateway.upstream.fail_next_task()
    await run_task(gateway)
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    expect_problem(await gateway.submit("seamless"), 502, "upstream-rejected")
    await use_unreachable_account(gateway)
    expect_problem(await gateway.submit("seamless"), 503, "upstream-unavailable")
    await gateway.put_tenant()
    name = await submit_and_lose_response(gateway, "vectorize")
    await gateway.submit()
    usage = await read_usage(gateway)
    assert count_outcomes(usage) == {
        (today, "vectorize"): {"unknown": 1},
        (today, "face-enhance"): {"running": 1, "succeeded": 1, "failed": 1},
        (today, "seamless"): {"refused": 1, "not_sent": 1},
    }
    assert set(usage["total"]["tasks"].values()) == {1}
    assert usage["total"]["charged"]["tasks"] == 4
    assert usage["unknown_submissions"] == [{"id": name, "kind": "vectorize", "day": today}]
    await recover_task(gateway, name)
    usage = await read_usage(gateway)
    assert count_outcomes(usage)[today, "vectorize"] == {"succeeded": 1}
    assert usage["unknown_submissions"] == []


async def test_uses_and_money_add_up(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        gateway = harness.gateway
        await harness.sandbox.set_balance(2, 100)
        await gateway.put_tenant(**UNREACHABLE_POLICIES)
        for _ in range(4):
            await harness.run_task()
        spent = (await read_usage(gateway))["total"]["spent"]
        assert spent["observed"] == {"count": 1, "money": 2 * PRICE_YUAN}
        assert spent["estimated"] == {"count": 1, "money": 0}
        assert await harness.upstream_balance() == (0, 100 - 2 * PRICE_YUAN)
        assert await read_charged_today(gateway) == (4, 2 * PRICE_YUAN)


async def test_months_and_totals(gateway: RunningGateway) -> None:
    first = await advance_to_next_window(gateway, "month")
    await run_task(gateway)
    second = await advance_to_next_window(gateway)
    await run_task(gateway)
    await run_task(gateway, "seamless")
    third = await advance_to_next_window(gateway, "month")
    await run_task(gateway)
    usage = await read_usage(gateway)
    assert count_outcomes(usage) == {(str(third), "face-enhance"): {"succeeded": 1}}
    assert usage["from"] == usage["to"] == str(third)
    for query, expected in (
        ("", [(str(first), "face-enhance", 1), (str(second), "face-enhance", 1), (str(second), "seamless", 1)]),
        (f"&to={first}&interval=month", [(f"{first:%Y-%m}", "face-enhance", 1)]),
        ("&interval=month&group_by=none", [(f"{first:%Y-%m}", None, 3), (f"{third:%Y-%m}", None, 1)]),
        ("&interval=total&group_by=none", [(f"{first}/{third}", None, 4)]),
    ):
        usage = await read_usage(gateway, f"from={first}{query}")
        items = [(item["period"], item["kind"], item["charged"]["tasks"]) for item in usage["items"]]
        assert items == expected + ([] if query else [(str(third), "face-enhance", 1)])
        assert sum(item[2] for item in items) == usage["total"]["charged"]["tasks"]
    in_its_month = await read_usage(gateway, f"to={second}")
    assert (in_its_month["from"], in_its_month["total"]["charged"]["tasks"]) == (str(first), 3)
    assert await read_windows(gateway) == {"day": (1, 0), "month": (1, 0), "total": (4, 0)}


async def test_usage_of_all_tenants(gateway: RunningGateway) -> None:
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    await run_task(gateway)
    await run_task(gateway, token=other)
    await run_task(gateway, "seamless", token=other)
    for query, expected in (
        ("", [("other", "face-enhance", 1), ("other", "seamless", 1), ("shop", "face-enhance", 1)]),
        ("group_by=tenant", [("other", None, 2), ("shop", None, 1)]),
        ("group_by=kind", [(None, "face-enhance", 2), (None, "seamless", 1)]),
    ):
        items = (await read_all_usage(gateway, query))["items"]
        assert [(item["tenant"], item["kind"], item["charged"]["tasks"]) for item in items] == expected
    filtered = await read_all_usage(gateway, "tenant=other&group_by=kind")
    mine = await read_usage(gateway, token=other)
    assert filtered["total"]["charged"]["tasks"] == mine["total"]["charged"]["tasks"] == 2
    assert [{**item, "tenant": None, "tenant_id": None} for item in mine["items"]] == filtered["items"]
    assert "tenant" not in str(mine)


async def test_usage_of_deleted_tenants(gateway: RunningGateway) -> None:
    await run_task(gateway)
    name = await submit_and_lose_response(gateway)
    old = gateway.services.registry.current.tenants["shop"].id
    before = await read_all_usage(gateway)
    await gateway.call_admin("DELETE", "/tenants/shop")
    assert await read_all_usage(gateway) == before
    await gateway.put_tenant()
    gateway.token = await gateway.new_token()
    assert (await read_usage(gateway))["total"]["charged"]["tasks"] == 0
    task = (await gateway.submit()).json()
    new = gateway.services.registry.current.tenants["shop"].id
    await gateway.call_admin("DELETE", "/tenants/shop?force=true")
    await gateway.poll_due_tasks()
    await gateway.put_tenant()
    usage = await read_all_usage(gateway, "tenant=shop")
    charged = [(item["tenant_id"], item["charged"]["tasks"], item["tasks"]["succeeded"]) for item in usage["items"]]
    assert charged == [(old, 2, 1), (new, 1, 1)]
    (unknown,) = usage["unknown_submissions"]
    assert (unknown["id"], unknown["tenant"], unknown["tenant_id"]) == (name, "shop", old)
    submission = expect_json(await post_refund(gateway, task=task["id"], reason="a farewell"), 201)
    assert (submission["tenant"], submission["task"]["state"]) == ("shop", "succeeded")
    assert (await read_all_usage(gateway, "tenant=shop"))["total"]["charged"]["tasks"] == 2


async def test_csv_equals_json(gateway: RunningGateway) -> None:
    first = await advance_to_next_window(gateway)
    await run_task(gateway)
    expect_json(await post_refund(gateway, task=(await run_task(gateway))["id"], reason="=1+1"), 201)
    await submit_and_lose_response(gateway, "seamless")
    await advance_to_next_window(gateway)
    await run_task(gateway, "vectorize")
    heads = set()
    for path in PATHS:
        for groups in ("none", "kind", *(("tenant", "tenant,kind") if "admin" in path else ())):
            for interval in ("day", "month", "total"):
                address = f"{path}?from={first}&interval={interval}&group_by={groups}"
                items = expect_json(await request_media_type(gateway, address, "application/json"))["items"]
                response = await request_media_type(gateway, address, "text/csv")
                assert response.headers["content-type"].startswith("text/csv; header=present")
                text = response.content.decode()
                assert text.count("\n") == text.count("\r\n")
                rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
                assert rows == [flatten_item(item) for item in items]
                heads.add((path, *rows[0]))
    assert len(heads) == 2
    nothing = await request_media_type(gateway, f"{PATHS[0]}?to={first - timedelta(days=1)}", "TEXT/*")
    assert (PATHS[0], *nothing.text.removesuffix("\r\n").split(",")) in heads
    for accept in ("text/csv;q=0.5, application/json", "text/csv;q=0", "image/png"):
        response = await request_media_type(gateway, PATHS[0], accept)
        assert response.headers["content-type"] == "application/json", accept
        assert (response.headers["vary"], response.headers["cache-control"]) == ("Accept", "private, no-cache")


@pytest.mark.parametrize("path", PATHS)
async def test_invalid_query(gateway: RunningGateway, path: str) -> None:
    today = date.fromisoformat((await read_usage(gateway))["to"])
    days = ["", "2026-1-1", "2026-02-30", "2026-01-01T00:00:00Z", "٢٠٢٦-٠١-٠١", "9999-12-31", "2026-01-01\n"]
    days += [str(today - timedelta(400)), str(today + timedelta(400))]
    faulty: dict[str, list[Any]] = {
        "from": [*days, [str(today)] * 2],
        "to": days,
        "interval": ["", "week", "day,month"],
        "group_by": ["week", "kind,kind", "none,kind", "kind,", ["kind"] * 2],
        "form": [str(today)],
    }
    if "admin" in path:
        faulty["tenant"] = ["unknown", "", "SHOP", "shop\n", "*"]
    else:
        faulty["group_by"] += ["tenant", "tenant,kind"]
        faulty["tenant"] = ["shop"]
    call = gateway.call_admin if "admin" in path else gateway.call
    path = path.removeprefix("/admin/v1")
    for field, values in faulty.items():
        for value in values:
            expect_invalid(await call("GET", path, params={field: value}), field)
    for first, last, status in ((-399, 0, 200), (0, 399, 200), (0, -1, 422), (-200, 200, 422)):
        span = {"from": str(today + timedelta(first)), "to": str(today + timedelta(last))}
        assert (await call("GET", path, params=span)).status_code == status


@pytest.mark.smoke
async def test_submission_of_a_task(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    name = submission_id_of(gateway, task)
    response = await gateway.call("GET", f"/v1/submissions/{name}")
    assert response.headers["cache-control"] == "private, no-cache"
    submission = expect_json(response)
    settled_at = submission.pop("settled_at")
    assert settled_at >= task["created_at"]
    expected: dict[str, Any] = {
        "id": name,
        "outcome": "accepted",
        "kind": "face-enhance",
        "created_at": task["created_at"],
        "task": {"id": task["id"], "state": "queued", "link": task["links"]["self"]},
        "cost": {"count": 0, "money": 0, "basis": "unknown"},
        "balance_suggests": None,
        "refund": None,
    }
    assert submission == expected
    for either_id in (name, task["id"]):
        operators = expect_json(await gateway.call_admin("GET", f"/submissions/{either_id}"))
        assert operators == expected | {"settled_at": settled_at, "tenant": "shop", "account": "main"}
    ended = await gateway.wait_for_task(task["id"])
    submission = await read_submission(gateway, name)
    assert (submission["task"]["state"], submission["cost"]) == ("succeeded", ended["cost"])


async def test_submission_not_found(gateway: RunningGateway) -> None:
    name = submission_id_of(gateway, (await gateway.submit()).json())
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    never = expect_problem(await gateway.call("GET", f"/v1/submissions/{'0' * 32}", token=other), 404, "not-found")
    for item in (name, "x", name[:-1], f"{name}0", name.upper(), f"{name}%0A", f"%00{name}", "*", "%2E%2E"):
        problem = expect_problem(await gateway.call("GET", f"/v1/submissions/{item}", token=other), 404, "not-found")
        assert problem | {"instance": ""} == never | {"instance": ""}, item
        if item != name:
            for resource in ("submissions", "tasks"):
                expect_problem(await gateway.call_admin("GET", f"/{resource}/{item}"), 404, "not-found")
