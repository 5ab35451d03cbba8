"""The demo's progress report."""

import io

import pytest

from service.demo.client import Cost
from service.demo.run import LineProgress, LiveProgress, format_cost


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (Cost(count=1, money=0, basis="observed"), "1 use"),
        (Cost(count=2, money=None, basis="observed"), "2 uses"),
        (Cost(count=0, money=0.5, basis="observed"), "¥0.50"),
        (Cost(count=1, money=2, basis="observed"), "1 use + ¥2.00"),
        (Cost(count=0, money=0, basis="observed"), "nothing"),
        (Cost(count=1, money=0, basis="estimated"), "~1 use"),
        (Cost(count=1, money=0, basis="unknown"), "?"),
        (None, "?"),
    ],
)
def test_cost(cost: Cost | None, text: str) -> None:
    """A cost is shown as uses, yuan or both, and marked if uncertain."""
    assert format_cost(cost) == text


def test_lines() -> None:
    """A log gets one line for each change, and none for an unchanged read."""
    output = io.StringIO()
    progress = LineProgress(output)
    for state in ("queued", "queued", "running"):
        progress.set_state("upscale", state)
    assert output.getvalue() == "upscale: queued\nupscale: running\n"


def render_terminal(written: str) -> list[str]:
    """Render output on a terminal that supports cursor-up and clear-below."""
    lines = [""]
    for chunk in written.replace("\x1b[J", "").split("\x1b["):
        up, final, rest = chunk.partition("F")
        moved = bool(final) and up.isdecimal()
        if moved:
            lines = [*lines[: len(lines) - 1 - int(up)], ""]
        first, *others = (rest if moved else chunk).split("\n")
        lines[-1] += first
        lines += others
    return lines


def test_live() -> None:
    """A terminal shows one line per task, updated in place, with state and seconds."""
    output, now = io.StringIO(), [100.0]
    progress = LiveProgress(output, ["upscale", "seamless"], clock=lambda: now[0])
    progress.set_state("upscale", "running")
    now[0] += 2.5
    progress.set_state("upscale", "succeeded")
    now[0] += 1
    progress.set_state("seamless", "running")
    assert render_terminal(output.getvalue()) == [
        "  upscale   succeeded     2.5 s",
        "| seamless  running       3.5 s",
        "",
    ]


def test_clear() -> None:
    output = io.StringIO()
    progress = LiveProgress(output, ["upscale"])
    progress.set_state("upscale", "running")
    progress.clear()
    output.write("table")
    assert render_terminal(output.getvalue()) == ["table"]
