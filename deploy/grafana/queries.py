"""Queries, put together from the names of metrics.

Each process counts for itself, so counters and its own gauges are added up; what the processes read from the ledger is
the same in all of them, so the largest is taken. A counter that has not begun yet, and a label that has not occurred,
are shown as zero as long as the gateway itself is seen: without that, nothing is known, and nothing is shown.
"""

from __future__ import annotations

RATE = "$__rate_interval"
"""The span of a rate that Grafana finds right for the resolution of the graph."""

_NAMESPACE = 'namespace=~"$namespace"'
_NONE = "none"


def series(name: str, *matchers: str) -> str:
    """The series of a metric in the chosen namespace, narrowed by further matchers."""
    return f"{name}{{{','.join((_NAMESPACE, *matchers))}}}"


_ZERO = f"0 * max({series('gateway_build_info')})"
"""0 while the gateway is seen, else nothing."""
_ZERO_IF_REDIS_UP = f"0 * (max({series('gateway_redis_up')}) == 1)"


def or_zero(query: str, label: str = "") -> str:
    """The query, or zero if it finds nothing; a label that it is grouped by then says `none`."""
    return _with_fallback(query, _ZERO, label)


def or_zero_if_redis_up(query: str, label: str = "") -> str:
    """The same for what is read from the ledger: it is zero only if the ledger could be read."""
    return _with_fallback(query, _ZERO_IF_REDIS_UP, label)


def sum_by(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """A gauge of each process, added up."""
    return f"sum{_by_clause(by)} ({series(name, *where)})"


def max_by(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """A gauge that all processes read from the ledger."""
    return f"max{_by_clause(by)} ({series(name, *where)})"


def rate(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Events per second of a counter, zero if there were none."""
    return or_zero(raw_rate(name, *by, where=where), by[0] if by else "")


def raw_rate(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Events per second of a counter that may not have begun."""
    return f"sum{_by_clause(by)} (rate({series(name, *where)}[{RATE}]))"


def per_minute(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Events per minute of a counter, zero if there were none."""
    return or_zero(f"60 * {raw_rate(name, *by, where=where)}", by[0] if by else "")


def per_hour(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Events per hour of a counter, zero if there were none."""
    return or_zero(f"3600 * {raw_rate(name, *by, where=where)}", by[0] if by else "")


def increase_by(name: str, *by: str, over: str, where: tuple[str, ...] = ()) -> str:
    """By how much a counter that all processes read from the ledger has grown."""
    return f"max{_by_clause(by)} (increase({series(name, *where)}[{over}]))"


def quantile(share: float, name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """The value that this share of the observations of a histogram stayed below; nothing where there were none."""
    buckets = raw_rate(f"{name}_bucket", *by, "le", where=where)
    return f"histogram_quantile({share}, {buckets})"


def mean(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """The mean of what a histogram or a summary observed; nothing where there were none."""
    return f"{raw_rate(f'{name}_sum', *by, where=where)} / ({raw_rate(f'{name}_count', *by, where=where)} > 0)"


def only_gateways(query: str) -> str:
    """Narrow what every process exports down to the processes of the gateway."""
    return f"{query} and on (job, instance) {series('gateway_build_info')}"


def _with_fallback(query: str, zero: str, label: str) -> str:
    named = f'label_replace({zero}, "{label}", "{_NONE}", "", "")' if label else zero
    return f"{query} or on () {named}"


def _by_clause(by: tuple[str, ...]) -> str:
    return f" by ({', '.join(by)})" if by else ""
