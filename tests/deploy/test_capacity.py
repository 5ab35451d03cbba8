"""The figures of CAPACITY.md follow from the stored results and the constants of the gateway."""

from __future__ import annotations

from service.clients.http import MAX_REQUESTS
from tests.bench.capacity_page import PAGE, update_page
from tests.bench.scaling import RESULTS
from tests.bench.scaling_report import Scaling

SCALING = Scaling.read(RESULTS / "scaling.json")


def test_page_has_the_stored_figures() -> None:
    assert update_page(PAGE.read_text("utf-8"), SCALING) == PAGE.read_text("utf-8")


def test_calculation() -> None:
    page = update_page("| `task_bytes` | 1 |\n`⌈1,000 × slots ÷ 7⌉ − 0.5 = 9.99` `2 × task_bytes = 0`", SCALING)
    size = round(SCALING.bytes["finished task"])
    first = -(-1_000 * MAX_REQUESTS // 7) - 0.5
    assert page == (
        f"| `task_bytes` | {size:,} |\n`⌈1,000 × slots ÷ 7⌉ − 0.5 = {first:,.2f}` `2 × task_bytes = {2 * size:,}`"
    )
