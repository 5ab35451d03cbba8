"""Concurrent submits to several processes: limits are exact, and so are the rejections."""

from __future__ import annotations

from functools import partial

import httpx2

from service.domain.tenants import Window
from tests.chaos.process_cluster import DAY_SECONDS, ProcessCluster
from tests.process.gateway import HTTP, wait_until

MONEY_ONLY = {"count": 0, "money": 10_000}
HALF_DAY_SECONDS = DAY_SECONDS // 2


def split_by_status(answers: list[httpx2.Response]) -> tuple[list[httpx2.Response], list[httpx2.Response]]:
    """Split into accepted and rate-limited responses; there must be no others."""
    taken, refused = ([answer for answer in answers if answer.status_code == status] for status in (201, 429))
    assert len(taken) + len(refused) == len(answers), {answer.status_code: answer.text for answer in answers}
    return taken, refused


def expect_same_policy(answers: list[httpx2.Response], code: str, policy: str, limit: int) -> None:
    """Require that all rejections name one policy."""
    assert {answer.json()["code"] for answer in answers} == {code}
    violated = [violation for answer in answers for violation in answer.json()["violated_policies"]]
    assert {(item["policy"], item["limit"]) for item in violated} == {(policy, limit)}
    assert len(violated) == len(answers)


def has_checked(cluster: ProcessCluster, times: int) -> bool:
    """Return whether the upstream has received so many checks."""
    return cluster.upstream.count_requests("check") >= times


def test_tasks_per_window(cluster: ProcessCluster) -> None:
    """Of 200 submits exactly 20 pass a limit of 20 per day; the next day, and not before, another 20."""
    shop = cluster.create_tenant({"limits": [{"window": "day", "tasks": 20}]}, MONEY_ONLY, {})
    taken, refused = split_by_status(shop.submit(200))
    assert (len(taken), len(refused), shop.count_submits()) == (20, 180, 20)
    expect_same_policy(refused, "quota-exceeded", "day-tasks", 20)
    assert {item.headers["retry-after"] for item in refused} == {str(HALF_DAY_SECONDS)}
    assert {item.headers["ratelimit"] for item in refused} == {f'"day-tasks";r=0;t={HALF_DAY_SECONDS}'}
    left = {item.headers["ratelimit"] for item in taken}
    assert left == {f'"day-tasks";r={number};t={HALF_DAY_SECONDS}' for number in range(20)}
    assert {item.headers["ratelimit-policy"] for item in taken + refused} == {f'"day-tasks";q=20;w={DAY_SECONDS}'}
    (resets,) = {item.json()["violated_policies"][0]["resets_at"] for item in refused}
    assert resets.endswith("T00:00:00Z")

    cluster.advance_clock(HALF_DAY_SECONDS - 1)
    taken, refused = split_by_status(shop.submit(20))
    assert (len(taken), {item.headers["retry-after"] for item in refused}) == (0, {"1"})
    cluster.advance_clock(1)
    taken, refused = split_by_status(shop.submit(200))
    assert (len(taken), len(refused), shop.count_submits()) == (20, 180, 40)
    assert {item.headers["retry-after"] for item in refused} == {str(DAY_SECONDS)}
    windows = shop.finish_tasks().windows
    assert (windows[Window.DAY].tasks, windows[Window.TOTAL].tasks) == (20, 40)
    assert {window.tasks_reserved for window in windows.values()} == {0}


def test_active_tasks(cluster: ProcessCluster) -> None:
    """Of 200 submits exactly as many pass as may be active; once those have ended, as many again."""
    shop = cluster.create_tenant({"max_active": 8}, MONEY_ONLY, {})
    for reached in (8, 16):
        cluster.upstream.set_faults({"on": "check", "reply": "page", "status": 503})
        checks = cluster.upstream.count_requests("check")
        taken, refused = split_by_status(shop.submit(200))
        assert (len(taken), len(refused), shop.count_submits()) == (8, 192, reached)
        expect_same_policy(refused, "too-many-active-tasks", "max-active", 8)
        assert not any("retry-after" in item.headers for item in refused)
        cluster.advance_clock(60)
        wait_until(partial(has_checked, cluster, checks + 8), "a check of every task")
        assert (split_by_status(shop.submit(20))[0], shop.read_counters().active_tasks) == ([], 8)
        cluster.upstream.set_faults()
        assert shop.finish_tasks().windows[Window.TOTAL].tasks == reached


def test_known_price(cluster: ProcessCluster) -> None:
    """A money limit admits exactly as many submits as it covers at the highest price; again the next day."""
    shop = cluster.create_tenant({"limits": [{"window": "day", "money": 10}]}, MONEY_ONLY, {"face-enhance": 3})
    for reached in (3, 6):
        taken, refused = split_by_status(shop.submit(100))
        assert (len(taken), shop.count_submits()) == (3, reached)
        expect_same_policy(refused, "quota-exceeded", "day-money", 10)
        day = shop.finish_tasks().windows[Window.DAY]
        assert (day.money_fen, day.money_reserved_fen, day.overrun_fen) == (900, 0, 0)
        assert split_by_status(shop.submit(20))[0] == []
        cluster.set_clock_to_noon()


def test_unknown_price(cluster: ProcessCluster) -> None:
    """Until a price is known, a money limit admits one submit at a time, then as many as it covers."""
    shop = cluster.create_tenant({"limits": [{"window": "month", "money": 10}]}, MONEY_ONLY, {})
    for reached in (1, 2):
        assert (len(split_by_status(shop.submit(60))[0]), shop.count_submits()) == (1, reached)
        shop.finish_tasks()
    assert shop.read_counters().windows[Window.MONTH].money_fen == 100
    taken, refused = split_by_status(shop.submit(60))
    assert (len(taken), shop.count_submits()) == (9, 11)
    expect_same_policy(refused, "quota-exceeded", "month-money", 10)
    month = shop.finish_tasks().windows[Window.MONTH]
    assert (month.money_fen, month.money_reserved_fen, month.overrun_fen) == (1_000, 0, 0)


def test_price_that_rose(cluster: ProcessCluster) -> None:
    """A cost above the held amount is charged in full; the excess is overrun, and no more submits pass."""
    shop = cluster.create_tenant({"limits": [{"window": "month", "money": 2}]}, MONEY_ONLY, {})
    for _ in range(2):
        assert len(split_by_status(shop.submit(1))[0]) == 1
        shop.finish_tasks()
    behaviour = {"seconds": 0, "prices": {"face": 5}}
    HTTP.put(f"{cluster.upstream.url}/_control/behaviour", json=behaviour).raise_for_status()
    assert len(split_by_status(shop.submit(60))[0]) == 1
    month = shop.finish_tasks().windows[Window.MONTH]
    assert (month.money_fen, month.money_reserved_fen, month.overrun_fen) == (600, 0, 400)
    assert (len(split_by_status(shop.submit(60))[0]), shop.count_submits()) == (0, 3)


def test_prepaid_uses(cluster: ProcessCluster) -> None:
    """Prepaid uses are spent regardless of the money limit, and money only within it."""
    shop = cluster.create_tenant(
        {"limits": [{"window": "month", "money": 2}]}, {"count": 9, "money": 100}, {"face-enhance": 1}
    )
    assert len(split_by_status(shop.submit(1))[0]) == 1
    shop.finish_tasks()
    while split_by_status(shop.submit(60))[0]:
        shop.finish_tasks()
    left = shop.read_balance()
    assert left["count"] == 0
    assert left["money"] >= 98
    assert shop.count_submits() == 9 + 100 - left["money"]
