"""What receivers of webhooks are sent, for the API's document: these requests are the gateway's own."""

from __future__ import annotations

from typing import Any

import msgspec

from service.api.examples import EXAMPLES
from service.api.views import TaskView
from service.api.webhook_views import TaskEvent
from service.domain.webhooks import Event

TAG = "Webhooks"
"""The tag of the webhooks alone: client generators write one file for each tag."""
_NAME = "task-ended"

_DESCRIPTION = (
    "Sent to the address you have agreed on with the operators, or to the task's `webhook_url`, once the task has "
    "ended, signed as [Standard Webhooks](https://www.standardwebhooks.com/) 1.0.0 has it: verify it with any library "
    "of theirs, your `whsec_` secret, and the bytes of the body as they came. Answer with a status from 200 to 299 "
    "within 15 seconds; anything else is tried again for a day, later and later, and 410 ends it for good. It comes "
    "at least once: what you have seen before has the same `webhook-id`."
)
_WEBHOOK_HEADERS = {
    "webhook-id": "The id of the event, the same whenever it is sent again.",
    "webhook-timestamp": "When this attempt was made, in seconds since the epoch.",
    "webhook-signature": "A signature, or two separated by a space while your secret is replaced.",
}


def add_webhooks(document: dict[str, Any]) -> None:
    """Add the webhooks to a document, with the components that they refer to."""
    components = document["components"]
    components["schemas"][TaskEvent.__name__] = _event()
    # Behind a reference: client generators take an operation that is written here for one of the gateway's.
    components["pathItems"] = {_NAME: {"post": _operation()}}
    document["webhooks"] = {_NAME: {"$ref": f"#/components/pathItems/{_NAME}"}}


def _event() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "What a tenant is told when a task has ended.",
        "properties": {
            "type": {"type": "string", "enum": [each.value for each in Event]},
            "timestamp": {"type": "string", "format": "date-time", "description": "When the task ended."},
            "data": {"$ref": "#/components/schemas/TaskView"},
        },
        "required": ["type", "timestamp", "data"],
    }


def _operation() -> dict[str, Any]:
    task = msgspec.convert(EXAMPLES["TaskView"], TaskView)
    example = TaskEvent(Event.SUCCEEDED, task.finished_at or task.updated_at, task)
    schema = {"$ref": f"#/components/schemas/{TaskEvent.__name__}"}
    return {
        "operationId": _NAME,
        "summary": "Your task has ended",
        "description": _DESCRIPTION,
        "tags": [TAG],
        "security": [{}],
        "parameters": [
            {"name": name, "in": "header", "required": True, "description": about, "schema": {"type": "string"}}
            for name, about in _WEBHOOK_HEADERS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": msgspec.to_builtins(example)}},
        },
        "responses": {"2XX": {"description": "You have it."}},
    }
