"""The costs of operations against tenants and tasks as tables, JSON and a plot."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from msgspec import Struct, field, json
from PIL import Image

from tests.bench.report import describe_machine, format_lines
from tests.bench.targets import format_number

_PAGE = """# Costs against tenants and tasks

Written by `make bench-scaling` on {date}, of commit `{commit}`.

{machine}

CPU milliseconds of one operation, in the gateway's process and in the store with its append-only file. All tenants have
counters and a month of usage. The number of tasks is that of the running ones; there are as many finished ones, and all
belong to the tenant that reads. *growth* is the last figure divided by the first. Costs include the HTTP request, those
of a submission also the request to the vendor. Callers send their requests on 16 connections in a closed loop, except
for the reads that are not cached, and operators one after the other.

![The costs of this run](scaling.png)

"""


class Cost(Struct, frozen=True):
    """CPU times of one operation, in milliseconds."""

    operation: str
    tenants: int
    tasks: int
    gateway_ms: float
    store_ms: float


class Scaling(Struct):
    """The results of a run: what they depend on, the costs, and the bytes of the store by what takes them."""

    facts: dict[str, Any]
    costs: list[Cost] = field(default_factory=list)
    bytes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Scaling:
        return json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        path.write_bytes(json.format(json.encode(self), indent=1) + b"\n")

    def rows(self) -> dict[str, list[Cost]]:
        """Return the costs by operation, in the order of the steps."""
        rows: dict[str, list[Cost]] = {}
        for cost in self.costs:
            rows.setdefault(cost.operation, []).append(cost)
        return rows


def format_tables(scaling: Scaling) -> str:
    tables = [
        f"### {title}\n\n{_format_costs(scaling, name)}"
        for title, name in (("Gateway", "gateway_ms"), ("Store", "store_ms"))
    ]
    memory = [
        ["memory of the store", "bytes"],
        *([name, format_number(value)] for name, value in scaling.bytes.items()),
    ]
    return "\n".join([*tables, f"### Memory\n\n{format_lines(memory)}"])


def _format_costs(scaling: Scaling, name: str) -> str:
    rows = scaling.rows()
    steps = [(cost.tenants, cost.tasks) for cost in next(iter(rows.values()))]
    lines = [["CPU ms", *(f"{tenants:,} tenants, {tasks:,} tasks" for tenants, tasks in steps), "growth"]]
    for operation, costs in rows.items():
        values = [getattr(cost, name) for cost in costs]
        lines.append([operation, *map(format_number, values), format_number(values[-1] / values[0])])
    return format_lines(lines)


def format_page(scaling: Scaling) -> str:
    return _PAGE.format(**scaling.facts, machine=describe_machine(scaling.facts)) + format_tables(scaling)


def draw(scaling: Scaling, path: Path) -> None:
    """Draw the costs against tenants and against tasks into a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only there for the benchmark

    figure = Figure(figsize=(12, 8), layout="constrained", dpi=80)
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    rows = scaling.rows()
    fewest = min(cost.tasks for cost in scaling.costs), max(cost.tenants for cost in scaling.costs)
    for position, (operation, costs) in enumerate(rows.items()):
        style = {"label": operation, "marker": "osv^D"[position % 5], "color": f"C{position % 10}", "linewidth": 1.2}
        style["linestyle"] = "-" if position < 10 else "--"
        tenants = [cost for cost in costs if cost.tasks == fewest[0]]
        tasks = [cost for cost in costs if cost.tenants == fewest[1]]
        for line, name in enumerate(("gateway_ms", "store_ms")):
            for column, (label, selected) in enumerate((("tenants", tenants), ("tasks", tasks))):
                axes[line][column].plot(
                    [getattr(cost, label) for cost in selected], [getattr(cost, name) for cost in selected], **style
                )
    for line, title in enumerate(("gateway", "store")):
        for column, label in enumerate(("tenants, with 1,000 tasks", "running tasks, with 1,000 tenants")):
            axis = axes[line][column]
            axis.set(xscale="log", yscale="log", title=f"{title}: CPU ms of an operation" if not column else "")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(visible=True, alpha=0.3)
            if line:
                axis.set_xlabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Costs against tenants and tasks, {scaling.facts['commit']}, {scaling.facts['date']}")
    picture = BytesIO()
    figure.savefig(picture)
    Image.open(picture).quantize(64).save(path, optimize=True)  # a third of its size
