"""PromQL builders.

Counters and gauges of each process are summed; values that all processes read from the ledger are the same, so their
maximum is taken. A counter or label without samples is shown as zero as long as the gateway is scraped; otherwise
nothing is shown.
"""

from __future__ import annotations

RATE = "$__rate_interval"
"""Grafana's window for rates, which suits the resolution of the graph."""

_NAMESPACE = 'namespace=~"$namespace"'
_NONE = "none"


def series(name: str, *matchers: str) -> str:
    """Select a metric in the chosen namespace, with further matchers."""
    return f"{name}{{{','.join((_NAMESPACE, *matchers))}}}"


_ZERO = f"0 * max({series('gateway_build_info')})"
"""0 while the gateway is scraped, otherwise empty."""
_ZERO_IF_REDIS_UP = f"0 * (max({series('gateway_redis_up')}) == 1)"


def or_zero(query: str, label: str = "") -> str:
    """Fall back to zero; the label of a grouped query is then `none`."""
    return _with_fallback(query, _ZERO, label)


def or_zero_if_redis_up(query: str, label: str = "") -> str:
    """Fall back to zero only if the ledger could be read."""
    return _with_fallback(query, _ZERO_IF_REDIS_UP, label)


def sum_by(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Sum a gauge of each process."""
    return f"sum{_by_clause(by)} ({series(name, *where)})"


def max_by(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Take the maximum of a gauge that all processes read from the ledger."""
    return f"max{_by_clause(by)} ({series(name, *where)})"


def rate(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Events per second of a counter, or zero."""
    return or_zero(raw_rate(name, *by, where=where), by[0] if by else "")


def raw_rate(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Events per second of a counter, empty if it has not started."""
    return f"sum{_by_clause(by)} (rate({series(name, *where)}[{RATE}]))"


def per_minute(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Events per minute of a counter, or zero."""
    return or_zero(f"60 * {raw_rate(name, *by, where=where)}", by[0] if by else "")


def per_hour(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Events per hour of a counter, or zero."""
    return or_zero(f"3600 * {raw_rate(name, *by, where=where)}", by[0] if by else "")


def increase_by(name: str, *by: str, over: str, where: tuple[str, ...] = ()) -> str:
    """The increase of a counter that all processes read from the ledger."""
    return f"max{_by_clause(by)} (increase({series(name, *where)}[{over}]))"


def quantile(share: float, name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """A quantile of a histogram, empty without observations."""
    buckets = raw_rate(f"{name}_bucket", *by, "le", where=where)
    return f"histogram_quantile({share}, {buckets})"


def mean(name: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """The mean of a histogram or summary, empty without observations."""
    return f"{raw_rate(f'{name}_sum', *by, where=where)} / ({raw_rate(f'{name}_count', *by, where=where)} > 0)"


def only_gateways(query: str) -> str:
    """Restrict a query to the processes of the gateway."""
    return f"{query} and on (job, instance) {series('gateway_build_info')}"


def _with_fallback(query: str, zero: str, label: str) -> str:
    named = f'label_replace({zero}, "{label}", "{_NONE}", "", "")' if label else zero
    return f"{query} or on () {named}"


def _by_clause(by: tuple[str, ...]) -> str:
    return f" by ({', '.join(by)})" if by else ""
