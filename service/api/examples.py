"""What answers look like, for the API's document: values of the same types that are sent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from service.api.events import event
from service.api.problems import PROBLEMS
from service.api.submission_views import SubmissionView
from service.api.tabular import table
from service.api.usage_views import usage_table, usage_view
from service.api.views import (
    AccountAbility,
    ArtifactView,
    CostView,
    LinksView,
    PolicyView,
    QuotaView,
    TaskList,
    TaskView,
)
from service.api.webhook_views import DeliveryList, DeliveryView, NewSecretView, WebhookView
from service.domain.ledger import Measure, Refund, ReservationState, Tally
from service.domain.tasks import OPTIONS, ArtifactName, Basis, Kind, State, UpscaleOptions
from service.domain.tenants import Window
from service.domain.webhooks import DeliveryState
from service.usecases.reports import BalanceSuggestion, Group, Interval, Marked, Owner, Report, Row

_ID = "task_Zm9yIHRoZSBkb2N1bWVudCBvbmx5"
_CREATED = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
_ENDED = datetime(2026, 1, 31, 12, 0, 21, tzinfo=UTC)

_TASK = TaskView(
    id=_ID,
    kind=Kind.UPSCALE,
    state=State.SUCCEEDED,
    created_at=_CREATED,
    updated_at=_ENDED,
    finished_at=_ENDED,
    options=msgspec.to_builtins(UpscaleOptions(scale=4)),
    metadata={"order": "4711"},
    artifacts=[
        ArtifactView(ArtifactName.IMAGE, "https://upstream.example/files/1.png", f"/v1/tasks/{_ID}/artifacts/image")
    ],
    error=None,
    cost=CostView(count=1, money=0, basis=Basis.OBSERVED),
    links=LinksView(self=f"/v1/tasks/{_ID}", events=f"/v1/tasks/{_ID}/events"),
)
_QUOTA = QuotaView(
    policies=[
        PolicyView(
            policy="day-tasks",
            unit="tasks",
            window=Window.DAY,
            limit=100,
            used=58,
            reserved=1,
            remaining=41,
            overrun=None,
            resets_at=datetime(2026, 2, 1, tzinfo=UTC),
        ),
        PolicyView(
            policy="max-active",
            unit="active",
            window=None,
            limit=20,
            used=1,
            reserved=0,
            remaining=19,
            overrun=None,
            resets_at=None,
        ),
    ],
    account=AccountAbility(can_pay=True, look_again_at=None),
)

_SUBMISSION = "f3a1c09b6d5e4f708192a3b4c5d6e7f8"
_OWNER = Owner(1_769_860_800_000, "shop")
_DAY = date(2026, 1, 31)
_TALLY = Tally({Measure.SUCCEEDED: 57, Measure.UNKNOWN: 1, Measure.OBSERVED_COUNT: 55, Measure.ESTIMATED_MONEY: 100})
_REFUND = Refund(int(_ENDED.timestamp()) * 1000, "The result was blank.", count=1, money=0)
_TALLY.update({Measure.REFUNDED: 1, Measure.REFUNDED_COUNT: 1})


def _report(*groups: Group) -> Report:
    """The usage of one day, told apart by these groups."""
    return Report(
        _DAY.replace(day=1),
        _DAY,
        Interval.DAY,
        groups,
        rows=[Row(str(_DAY), _OWNER if Group.TENANT in groups else None, Kind.UPSCALE, _TALLY)],
        total=_TALLY,
        unknown=[Marked(_SUBMISSION, _OWNER, Kind.UPSCALE, _DAY)],
        refunds=[(Marked("0c7d9f2b4a6e81c35f7092b4d6e8a1c3", _OWNER, Kind.UPSCALE, _DAY), _REFUND)],
    )


_UNKNOWN = SubmissionView(
    id=_SUBMISSION,
    outcome=ReservationState.UNKNOWN,
    kind=Kind.UPSCALE,
    created_at=_CREATED,
    settled_at=_ENDED,
    task=None,
    cost=CostView(count=0, money=1.2, basis=Basis.UNKNOWN),
    balance_suggests=BalanceSuggestion.NOT_CHARGED,
    refund=None,
)

_FAILED = DeliveryView(
    id=f"msg_{_SUBMISSION}",
    tenant="shop",
    task=_ID,
    url="https://hooks.example/ended",
    state=DeliveryState.FAILED,
    attempts=11,
    status=500,
    error="It answered 500.",
    answer="no space left",
    created_at=_ENDED,
    updated_at=datetime(2026, 2, 1, 11, 2, tzinfo=UTC),
    due_at=None,
)

EXAMPLES: Mapping[str, Struct] = {
    type(example).__name__: example
    for example in (
        _TASK,
        TaskList([_TASK], next_cursor=None),
        _QUOTA,
        _UNKNOWN,
        WebhookView("https://hooks.example/ended", ["hooks.example", "10.20.0.0/16"], []),
        NewSecretView("whsec_Zm9yIHRoZSBkb2N1bWVudCBvbmx5LCBub3QgYSBrZXk=", _ENDED),
        _FAILED,
        DeliveryList([_FAILED]),
        usage_view(_report(Group.KIND), for_operators=False),
    )
}
"""An example of each kind of answer that has one, by the name of its type."""

TABLES: Mapping[str, str] = {
    "read-usage": table(*usage_table(_report(Group.KIND), for_operators=False)).decode(),
    "read-all-usage": table(*usage_table(_report(Group.TENANT, Group.KIND), for_operators=True)).decode(),
}
"""What is answered as CSV to those who want it, by the operation's id."""

STREAMS: Mapping[str, str] = {"follow-task": event(_TASK, 3).decode()}
"""What is answered as a stream of events, by the operation's id."""

ACCEPTED: Mapping[str, Struct] = {
    f"submit-{kind}": replace(
        _TASK,
        kind=kind,
        state=State.QUEUED,
        updated_at=_CREATED,
        finished_at=None,
        options=msgspec.to_builtins(OPTIONS[kind]()),
        artifacts=[],
        cost=CostView(count=0, money=0, basis=Basis.UNKNOWN),
    )
    for kind in Kind
}
"""The task as it is answered to each submission, by the operation's id."""

_EXTRAS: Mapping[str, Mapping[str, Any]] = {
    "invalid-options": {"errors": [{"field": "scale", "detail": "must be a number from 1 to 8"}]},
    "quota-exceeded": {
        "violated_policies": [{"policy": "day-tasks", "limit": 100, "resets_at": "2026-02-01T00:00:00Z"}]
    },
    "rate-limited": {
        "violated_policies": [{"policy": "minute-tasks", "limit": 10, "resets_at": "2026-01-31T12:01:00Z"}]
    },
    "too-many-active-tasks": {"violated_policies": [{"policy": "max-active", "limit": 20, "resets_at": None}]},
    "upstream-rejected": {"upstream_reason": "图片太小"},
    "submission-unknown": {"submission_id": _SUBMISSION},
}


def problem(code: str) -> dict[str, Any]:
    """An example of a problem."""
    kind = next(each for each in PROBLEMS if each.code == code)
    return {
        "type": f"urn:imaging-gateway:problem:{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": kind.when,
        "instance": "4f5c2d1e8b7a46f09d3c6b5a49382716",
        "code": code,
    } | dict(_EXTRAS.get(code, {}))
