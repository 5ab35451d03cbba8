"""What is told about webhooks: to operators, and to tenants when a task has ended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from service.api.views import TaskView, moment, task_view
from service.domain import tenants, webhooks
from service.domain.errors import Faults
from service.domain.tasks import Task
from service.domain.tenants import Webhook
from service.domain.webhooks import MAX_ALLOWED, MAX_URL, DeliveryState, Event
from service.usecases.admin import NewSecret, Owned

_Secret = Annotated[str, Meta(description="`whsec_` and base64. Shown this once.")]


class WebhookBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tenant is told of the ends of its tasks. Without a secret it keeps the one it has, or one is made."""

    url: Annotated[str, Meta(max_length=MAX_URL, description="By default.")]
    secret: Annotated[str, Meta(max_length=200, description="`whsec_` and the base64 of 24 to 64 bytes.")] | None = None
    allow: Annotated[
        list[Annotated[str, Meta(max_length=255)]],
        Meta(
            max_length=MAX_ALLOWED,
            description="Hosts that a task may name in `webhook_url`, beside that of `url`. They may be at public and "
            "private addresses; networks such as 127.0.0.0/8 let them be at other ones.",
        ),
    ] = []

    def webhook(self) -> Webhook:
        """What it describes, without its secret. Raises InvalidOptions."""
        faults = Faults()
        url = faults.attempt("", self.url, webhooks.parse_url, "webhook.url", self.url)
        allow = faults.attempt("", (), webhooks.parse_allowed, "webhook.allow", self.allow)
        faults.check()
        return Webhook(url, allow)


class WebhookView(Struct, frozen=True):
    """Where a tenant is told of the ends of its tasks."""

    url: str
    allow: list[str]
    switched_off: Annotated[list[str], Meta(description="They answered 410. Put the tenant again to send there again.")]
    secret: _Secret | UnsetType = UNSET


class NewSecretView(Struct, frozen=True):
    """A secret that was just made. Until `former_until` the one before signs too."""

    secret: _Secret
    former_until: datetime


class DeliveryView(Struct, frozen=True):
    """How the end of a task was told to its tenant."""

    id: Annotated[str, Meta(description="The `webhook-id`, the same however often it is sent.")]
    tenant: str | None
    task: Annotated[str, Meta(description="The id of the task.")]
    url: Annotated[str, Meta(description="Without its query.")]
    state: DeliveryState
    attempts: Annotated[int, Meta(description="Since it was last sent from the start.")]
    status: Annotated[int | None, Meta(description="Of the last answer.")]
    error: Annotated[str | None, Meta(description="Why the last attempt failed.")]
    answer: Annotated[str | None, Meta(description="How the last answer began, if it was no success.")]
    created_at: datetime
    updated_at: datetime
    due_at: Annotated[datetime | None, Meta(description="When it is tried next.")]


class DeliveryList(Struct, frozen=True):
    """Deliveries that were given up, the newest first."""

    items: list[DeliveryView]


class TaskEvent(Struct, frozen=True):
    """What a tenant is told when a task has ended."""

    type: Event
    timestamp: Annotated[datetime, Meta(description="When the task ended.")]
    data: TaskView


def task_event(task: Task) -> bytes:
    """The body that tells of the end of a task: the same bytes whenever it is sent."""
    event = TaskEvent(Event.of(task.state), moment(task.finished or task.updated), task_view(task))
    return msgspec.json.encode(event)


def webhook_view(found: Webhook, secret: str | None) -> WebhookView | None:
    """A webhook as operators see it, with its secret if it was just made."""
    if found.url is None:
        return None
    return WebhookView(found.url, list(found.allow), list(found.off), UNSET if secret is None else secret)


def new_secret_view(made: NewSecret) -> NewSecretView:
    """A secret as it is shown once."""
    return NewSecretView(made.text, datetime.fromtimestamp(made.until, UTC))


def delivery_view(owned: Owned) -> DeliveryView:
    """A delivery as operators see it."""
    found = owned.delivery
    return DeliveryView(
        id=webhooks.event_id(found.reservation),
        tenant=owned.tenant,
        task=found.task,
        url=tenants.without_query(found.url),
        state=found.state,
        attempts=found.attempts,
        status=found.status,
        error=found.error,
        answer=found.answer,
        created_at=moment(found.created),
        updated_at=moment(found.updated),
        due_at=moment(found.due),
    )
