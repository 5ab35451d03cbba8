"""The report: a table of what was asked, what it cost and what came back."""

from collections.abc import Iterable, Sequence

from service.demo.checks import size_text
from service.demo.errand import Errand
from service.demo.gateway import Cost

_HEAD = ("kind", "state", "seconds", "cost", "file", "pixels", "check")
_RIGHT = frozenset({"seconds"})


def table(errands: Iterable[Errand]) -> str:
    """Draw one line for each result, and one for a task without any."""
    rows: list[Sequence[str]] = [_HEAD]
    for errand in errands:
        first = (errand.kind, errand.state, f"{errand.seconds:.1f}", cost_text(errand.cost))
        results = [
            (
                errand.files.get(finding.name, ""),
                size_text(finding.size),
                finding.text if finding.real else "wrong, see below",
            )
            for finding in errand.findings
        ] or [("", "", "")]
        rows.append((*first, *results[0]))
        rows.extend(("", "", "", "", *result) for result in results[1:])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(_line(row, widths) for row in rows)


def complaints(errands: Iterable[Errand]) -> Sequence[str]:
    """Say each complaint once, after the kinds that have it."""
    kinds: dict[str, list[str]] = {}
    for errand in errands:
        for complaint in errand.complaints:
            kinds.setdefault(complaint, []).append(errand.kind)
    return [f"{', '.join(those)}: {complaint}" for complaint, those in kinds.items()]


def cost_text(cost: Cost | None) -> str:
    """Write a cost as uses, yuan or both: `~` marks an estimate, `?` a cost that nobody knows."""
    if cost is None or cost.basis == "unknown":
        return "?"
    parts = []
    if cost.count:
        parts.append(f"{cost.count} use{'' if cost.count == 1 else 's'}")
    if cost.money:
        parts.append(f"¥{cost.money:.2f}")
    return ("~" if cost.basis == "estimated" else "") + (" + ".join(parts) or "nothing")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if name in _RIGHT else cell.ljust(width)
        for name, cell, width in zip(_HEAD, row, widths, strict=True)
    )
    return "  ".join(cells).rstrip() + "\n"
