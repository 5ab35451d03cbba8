"""Concurrent submits to several processes: limits are exact, and so are the rejections."""

from __future__ import annotations

from tests.chaos.process_cluster import DAY_SECONDS, ProcessCluster, TenantClient
from tests.process.gateway import wait_until

MONEY_ONLY = {"count": 0, "money": 10_000}
HALF_DAY_SECONDS = DAY_SECONDS // 2


def expect_accepted(shop: TenantClient, times: int, accepted: int, policy: str = "") -> set[str | None]:
    """Require that so many of the submits are accepted, and all others violate one policy; return their Retry-After."""
    before, answers = shop.count_submits(), shop.submit(times)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers if answer not in refused] == [201] * accepted
    violated = [item["policy"] for answer in refused for item in answer.json()["violated_policies"]]
    assert violated == [policy] * (times - accepted)
    assert shop.count_submits() == before + accepted
    return {answer.headers.get("retry-after") for answer in refused}


def wait_for_checks(cluster: ProcessCluster, times: int) -> None:
    wait_until(lambda: cluster.upstream.count_requests("check") >= times, "a check of every task")


def test_tasks_per_day_are_exact(cluster: ProcessCluster) -> None:
    limits = [{"window": "day", "tasks": 20}, {"window": "total", "tasks": 1000}]
    shop = cluster.create_tenant({"limits": limits, "max_active": 1000}, MONEY_ONLY, {})
    assert expect_accepted(shop, 200, 20, "day-tasks") == {str(HALF_DAY_SECONDS)}
    cluster.advance_clock(HALF_DAY_SECONDS - 1)
    assert expect_accepted(shop, 20, 0, "day-tasks") == {"1"}
    cluster.advance_clock(1)
    assert expect_accepted(shop, 200, 20, "day-tasks") == {str(DAY_SECONDS)}
    policies = shop.finish_tasks()
    counters = [(policies[name]["used"], policies[name]["reserved"]) for name in ("day-tasks", "total-tasks")]
    assert counters == [(20, 0), (40, 0)]


def test_active_tasks_are_exact(cluster: ProcessCluster) -> None:
    shop = cluster.create_tenant({"max_active": 8}, MONEY_ONLY, {})
    for _ in range(2):
        cluster.upstream.set_faults({"on": "check", "reply": "page", "status": 503})
        checks = cluster.upstream.count_requests("check")
        assert expect_accepted(shop, 200, 8, "max-active") == {None}
        cluster.advance_clock(60)
        wait_for_checks(cluster, checks + 8)
        expect_accepted(shop, 20, 0, "max-active")
        cluster.upstream.set_faults()
        shop.finish_tasks()


def test_money_per_day_is_exact(cluster: ProcessCluster) -> None:
    limits = [{"window": "day", "money": 10}]
    shop = cluster.create_tenant({"limits": limits, "max_active": 1000}, MONEY_ONLY, {"face-enhance": 3})
    for _ in range(2):
        expect_accepted(shop, 100, 3, "day-money")
        day = shop.finish_tasks()["day-money"]
        assert (day["used"], day["reserved"], day["overrun"]) == (9, 0, 0)
        expect_accepted(shop, 20, 0, "day-money")
        cluster.set_clock_to_noon()
