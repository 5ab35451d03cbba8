"""The headers that tell a tenant what is left of its limits on tasks (`RateLimit` and `RateLimit-Policy`)."""

from __future__ import annotations

from collections.abc import Sequence

from service.domain.ledger import RateLimit


def rate_limit_headers(limits: Sequence[RateLimit]) -> dict[str, str]:
    """Both headers, or none if nothing is limited. A limit that never resets has neither window nor reset."""
    if not limits:
        return {}
    return {
        "RateLimit-Policy": ", ".join(f'"{each.policy}";q={each.limit}{_seconds("w", each.window)}' for each in limits),
        "RateLimit": ", ".join(f'"{each.policy}";r={each.remaining}{_seconds("t", each.resets)}' for each in limits),
    }


def _seconds(parameter: str, value: int | None) -> str:
    return "" if value is None else f";{parameter}={value}"
