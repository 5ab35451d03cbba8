"""Many submits at once to several processes: what a limit lets through is exact, and so is what the others are told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import httpx2
import pytest

from service.domain.tenants import Window
from tests.chaos.fleet import DAY, Fleet, fleet
from tests.process.gateway import until

pytestmark = pytest.mark.xdist_group("limits")  # its processes are started once

RICH = {"count": 0, "money": 10_000}
HALF_A_DAY = DAY // 2


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three gateways, for all tests of this module."""
    with fleet(tmp_path_factory.mktemp("fleet"), 3) as found:
        yield found


@pytest.fixture
def gateways(three: Fleet) -> Fleet:
    """The same, at noon, with an upstream that does all at once."""
    three.upstream.dial()
    three.noon()
    return three


def parted(answers: list[httpx2.Response]) -> tuple[list[httpx2.Response], list[httpx2.Response]]:
    """Those that were taken, and those that a limit refused: there must be no others."""
    taken, refused = ([each for each in answers if each.status_code == status] for status in (201, 429))
    assert len(taken) + len(refused) == len(answers), {each.status_code: each.text for each in answers}
    return taken, refused


def same(answers: list[httpx2.Response], code: str, policy: str, limit: int) -> None:
    """See that all refusals name one policy."""
    assert {each.json()["code"] for each in answers} == {code}
    violated = [violation for each in answers for violation in each.json()["violated_policies"]]
    assert {(each["policy"], each["limit"]) for each in violated} == {(policy, limit)}
    assert len(violated) == len(answers)


def checked(gateways: Fleet, times: int) -> bool:
    """Whether the upstream was asked about tasks so many times."""
    return gateways.upstream.count("check") >= times


def test_tasks_per_window(gateways: Fleet) -> None:
    """Of 500 submits exactly 20 get through a limit of 20 per day; the next day, and not before, 20 more."""
    shop = gateways.shop({"limits": [{"window": "day", "tasks": 20}]}, RICH, {})
    taken, refused = parted(shop.submit(500))
    assert (len(taken), len(refused), shop.reached()) == (20, 480, 20)
    same(refused, "quota-exceeded", "day-tasks", 20)
    assert {each.headers["retry-after"] for each in refused} == {str(HALF_A_DAY)}
    assert {each.headers["ratelimit"] for each in refused} == {f'"day-tasks";r=0;t={HALF_A_DAY}'}
    left = {each.headers["ratelimit"] for each in taken}
    assert left == {f'"day-tasks";r={number};t={HALF_A_DAY}' for number in range(20)}
    assert {each.headers["ratelimit-policy"] for each in taken + refused} == {f'"day-tasks";q=20;w={DAY}'}
    (resets,) = {each.json()["violated_policies"][0]["resets_at"] for each in refused}
    assert resets.endswith("T00:00:00Z")

    gateways.pass_by(HALF_A_DAY - 1)
    taken, refused = parted(shop.submit(20))
    assert (len(taken), {each.headers["retry-after"] for each in refused}) == (0, {"1"})
    gateways.pass_by(1)
    taken, refused = parted(shop.submit(500))
    assert (len(taken), len(refused), shop.reached()) == (20, 480, 40)
    assert {each.headers["retry-after"] for each in refused} == {str(DAY)}
    windows = shop.finish().windows
    assert (windows[Window.DAY].tasks, windows[Window.TOTAL].tasks) == (20, 40)
    assert {each.tasks_reserved for each in windows.values()} == {0}


def test_active_tasks(gateways: Fleet) -> None:
    """Of 500 submits exactly as many get through as may be active; once those have ended, as many again."""
    shop = gateways.shop({"max_active": 8}, RICH, {})
    for reached in (8, 16):
        gateways.upstream.dial({"on": "check", "reply": "page", "status": 503})
        checks = gateways.upstream.count("check")
        taken, refused = parted(shop.submit(500))
        assert (len(taken), len(refused), shop.reached()) == (8, 492, reached)
        same(refused, "too-many-active-tasks", "max-active", 8)
        assert not any("retry-after" in each.headers for each in refused)
        gateways.pass_by(60)
        until(partial(checked, gateways, checks + 8), "a check of every task")
        assert (parted(shop.submit(20))[0], shop.counters().active) == ([], 8)
        gateways.upstream.dial()
        assert shop.finish().windows[Window.TOTAL].tasks == reached


def test_known_price(gateways: Fleet) -> None:
    """A limit on money lets exactly as many through as it could pay for at the highest price; so again the next day."""
    shop = gateways.shop({"limits": [{"window": "day", "money": 10}]}, RICH, {"face-enhance": 3})
    for reached in (3, 6):
        taken, refused = parted(shop.submit(100))
        assert (len(taken), shop.reached()) == (3, reached)
        same(refused, "quota-exceeded", "day-money", 10)
        day = shop.finish().windows[Window.DAY]
        assert (day.money, day.money_reserved, day.overrun) == (900, 0, 0)
        assert parted(shop.submit(20))[0] == []
        gateways.noon()


def test_unknown_price(gateways: Fleet) -> None:
    """Until a price was seen, a limit on money lets one through at a time; then as many as what remains can pay for."""
    shop = gateways.shop({"limits": [{"window": "month", "money": 10}]}, RICH, {})
    for reached in (1, 2):
        assert (len(parted(shop.submit(60))[0]), shop.reached()) == (1, reached)
        shop.finish()
    assert shop.counters().windows[Window.MONTH].money == 100
    taken, refused = parted(shop.submit(60))
    assert (len(taken), shop.reached()) == (9, 11)
    same(refused, "quota-exceeded", "month-money", 10)
    month = shop.finish().windows[Window.MONTH]
    assert (month.money, month.money_reserved, month.overrun) == (1_000, 0, 0)


def test_price_that_rose(gateways: Fleet) -> None:
    """A receipt above what was held is booked in full; what passes the limit is overrun, and no more gets through."""
    shop = gateways.shop({"limits": [{"window": "month", "money": 2}]}, RICH, {})
    for _ in range(2):
        assert len(parted(shop.submit(1))[0]) == 1
        shop.finish()
    httpx2.put(f"{gateways.upstream.url}/_control/dials", json={"seconds": 0, "prices": {"face": 5}}).raise_for_status()
    assert len(parted(shop.submit(60))[0]) == 1
    month = shop.finish().windows[Window.MONTH]
    assert (month.money, month.money_reserved, month.overrun) == (600, 0, 400)
    assert (len(parted(shop.submit(60))[0]), shop.reached()) == (0, 3)


def test_prepaid_uses(gateways: Fleet) -> None:
    """Prepaid uses are spent whatever the limit on money, and of the money no more than the limit."""
    shop = gateways.shop({"limits": [{"window": "month", "money": 2}]}, {"count": 9, "money": 100}, {"face-enhance": 1})
    assert len(parted(shop.submit(1))[0]) == 1
    shop.finish()
    while parted(shop.submit(60))[0]:
        shop.finish()
    left = shop.balance()
    assert left["count"] == 0
    assert left["money"] >= 98
    assert shop.reached() == 9 + 100 - left["money"]
