"""What is different between two versions of the registry, place by place, as operators see it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from service.api.registry_views import DifferenceKind, DifferenceView, RegistryBody, registry_body
from service.domain.errors import dotted
from service.domain.tenants import without_query
from service.usecases.registry_apply import Plan

_KEY, _SECRET, _ADDRESS = ("user_key", "value"), ("webhook", "secret", "value"), ("webhook", "url")


def differences(plan: Plan, now: float) -> list[DifferenceView]:
    """What a plan changes, at a time in seconds since the epoch; of secrets only that they change."""
    before, after = (_plain(registry_body(each, now), plan.fresh) for each in (plan.before, plan.after))
    rekeyed, resigned = plan.rekeyed & plan.before.accounts.keys(), plan.resigned & plan.before.tenants.keys()
    found = [
        *_between(before, after),
        *(DifferenceView(dotted("accounts", name, *_KEY), DifferenceKind.CHANGED) for name in rekeyed),
        *(DifferenceView(dotted("tenants", name, *_SECRET), DifferenceKind.CHANGED) for name in resigned),
        *(DifferenceView(dotted("tenants", name, *_SECRET), DifferenceKind.ADDED) for name in plan.made),
    ]
    return sorted(found, key=lambda each: each.path)


def _plain(body: RegistryBody, fresh: Collection[int]) -> dict[str, Any]:
    """The registry as plain values, without ids that nobody asked for: a dry run can't know what they will be."""
    plain: dict[str, Any] = {"accounts": {}, "tenants": {}} | msgspec.to_builtins(body)
    for owners in plain.values():
        for owner in owners.values():
            if owner["id"] in fresh:
                del owner["id"]
    return plain


def _between(before: Mapping[str, Any], after: Mapping[str, Any], *path: str) -> Iterator[DifferenceView]:
    for key in sorted({*before, *after}):
        old, new, where = before.get(key), after.get(key), (*path, key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _between(old, new, *where)
        elif key not in before:
            yield DifferenceView(dotted(*where), DifferenceKind.ADDED, after=_shown(new, *where))
        elif key not in after:
            yield DifferenceView(dotted(*where), DifferenceKind.REMOVED, before=_shown(old, *where))
        elif old != new:
            yield DifferenceView(dotted(*where), DifferenceKind.CHANGED, _shown(old, *where), _shown(new, *where))


def _shown(value: Any, *path: str) -> Any:
    """A value as it may stand in the log of whatever applies a registry: of a webhook the address without its query."""
    if isinstance(value, dict):
        return {key: _shown(each, *path, key) for key, each in value.items()}
    if path[-2:] == _ADDRESS and value is not None and without_query(value) != value:
        return f"{without_query(value)}?…"
    return value
