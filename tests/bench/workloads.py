"""The workloads of the comparison, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.bench import bursts, closed_loops, running_tasks, upkeep
from tests.bench.comparison import Comparison
from tests.bench.images import LARGE, SMALL

Workload = Callable[[Comparison], None]

WORKLOADS: Mapping[str, tuple[Workload, tuple[str, ...]]] = {
    "read": (closed_loops.read, (closed_loops.READ,)),
    "submit-small": (closed_loops.submit_small, (closed_loops.SMALL_SUBMIT,)),
    "submit-large": (closed_loops.submit_large, (closed_loops.LARGE_SUBMIT,)),
    "slow-vendor": (closed_loops.slow_vendor, (closed_loops.SLOW_VENDOR,)),
    "large-at-once": (bursts.large_at_once, tuple(bursts.LARGE_ROWS.values())),
    "waiters": (bursts.waiters, (bursts.WAITERS_ROW,)),
    "overload-small": (bursts.overload_small, (bursts.OVERLOAD_ROWS[SMALL],)),
    "overload-large": (bursts.overload_large, (bursts.OVERLOAD_ROWS[LARGE],)),
    # The larger store is made of the smaller one, so that these keep their order.
    "poller-few": (running_tasks.poller_few, (running_tasks.POLLER[running_tasks.FEW],)),
    "poller-many": (running_tasks.poller_many, (running_tasks.POLLER[running_tasks.MANY],)),
    "read-many": (running_tasks.read_many, (running_tasks.MANY_IDS,)),
    "list": (running_tasks.list_tasks, (running_tasks.LIST,)),
    "beside-running": (running_tasks.beside_running, (running_tasks.READ_BESIDE, running_tasks.SUBMIT_BESIDE)),
    "scrape": (upkeep.scrape, (upkeep.SCRAPE, upkeep.READ_SCRAPED)),
    "idle": (upkeep.start_and_idle, (upkeep.IDLE,)),
}
"""By name: the function, and the headings of its measurements."""
QUICK = ("read", "submit-small", "submit-large")


def row_titles() -> dict[str, str]:
    """Return the description of each heading."""
    return {heading: (workload.__doc__ or "") for workload, headings in WORKLOADS.values() for heading in headings}
