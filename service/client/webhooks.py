"""Verification of webhooks, signed after Standard Webhooks 1.0.0."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec

from service.client.errors import InvalidWebhook
from service.client.models import QuotaThreshold, Task

_SECRET_PREFIX = "whsec_"  # noqa: S105 - a public prefix
_VERSION = "v1"
_TIMESTAMP = re.compile(r"[0-9]{1,15}")


class WebhookEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A verified event. Each attempt to deliver it has the same `id`: handle an id once."""

    id: str = ""
    type: str
    timestamp: datetime
    data: msgspec.Raw

    @property
    def task(self) -> Task:
        """The task of `task.succeeded` and `task.failed`. Raises InvalidWebhook for an event of another type."""
        try:
            return msgspec.json.decode(self.data, type=Task)
        except msgspec.DecodeError as error:
            raise InvalidWebhook(f"{self.type} has no task: {error}") from None

    @property
    def threshold(self) -> QuotaThreshold:
        """The reached threshold of `quota.threshold`. Raises InvalidWebhook for an event of another type."""
        try:
            return msgspec.json.decode(self.data, type=QuotaThreshold)
        except msgspec.DecodeError as error:
            raise InvalidWebhook(f"{self.type} has no threshold: {error}") from None


def verify_webhook(
    body: bytes,
    headers: Mapping[str, str],
    secrets: str | Sequence[str],
    *,
    tolerance_seconds: float = 300.0,
    now: float | None = None,
) -> WebhookEvent:
    """Return the event of a request, given the body as it was received.

    Raises InvalidWebhook, and ValueError for a secret that is none.

    One of `secrets` (`whsec_...`) must have signed it, at most `tolerance_seconds` from `now`, in seconds since the
    epoch. While a secret is rotated, either is sufficient.
    """
    fields = {name.lower(): value for name, value in headers.items()}
    message_id, timestamp = fields.get("webhook-id", ""), fields.get("webhook-timestamp", "")
    if not message_id or not _TIMESTAMP.fullmatch(timestamp):
        raise InvalidWebhook("the request has no webhook-id and webhook-timestamp")
    if abs((time.time() if now is None else now) - int(timestamp)) > tolerance_seconds:
        raise InvalidWebhook("the webhook is too old, or the clocks differ")
    content = b".".join([message_id.encode(errors="replace"), timestamp.encode(), body])
    received = [
        signature.encode(errors="replace")  # some servers pass bytes that are not UTF-8 on as surrogates
        for version, _, signature in (item.partition(",") for item in fields.get("webhook-signature", "").split())
        if version == _VERSION
    ]
    expected = [_sign(secret, content) for secret in ([secrets] if isinstance(secrets, str) else secrets)]
    if not any(hmac.compare_digest(ours, theirs) for ours in expected for theirs in received):
        raise InvalidWebhook("no signature matches a secret")
    try:
        event = msgspec.json.decode(body, type=WebhookEvent)
    except msgspec.DecodeError as error:
        raise InvalidWebhook(f"the body is no event: {error}") from None
    return msgspec.structs.replace(event, id=message_id)


def _sign(secret: str, content: bytes) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not key or not secret.startswith(_SECRET_PREFIX):  # a mistake of the receiver, not of the request
        raise ValueError(f"a webhook secret is {_SECRET_PREFIX} and base64")
    return base64.b64encode(hmac.digest(key, content, hashlib.sha256))
