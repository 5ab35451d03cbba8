"""Rules of webhooks: secrets, signatures, addresses and retries."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from enum import StrEnum
from ipaddress import IPv6Address
from urllib.parse import urlsplit

from service.domain.errors import FieldError, InvalidOptions
from service.domain.tasks import State
from service.domain.tenants import Webhook, parse_network

SECRET_PREFIX = "whsec_"  # noqa: S105 - what makes a leaked secret recognisable, not a secret


_NEW_SECRET_BYTES = 32


_MIN_SECRET_BYTES, _MAX_SECRET_BYTES = 24, 64


_EVENT_ID_PREFIX = "msg_"


_EVENT_ID = re.compile(rf"{_EVENT_ID_PREFIX}([0-9a-f]{{32}})")


MAX_URL_CHARS = 2_048


MAX_ALLOW_ENTRIES = 100


RETRY_SECONDS = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 28_800)
"""How long after each attempt that failed the next one comes; after the last of them the event is given up."""


MAX_RETRY_AFTER_SECONDS = 3_600


_JITTER_RATIO = 0.2


_HOST_PATTERN = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")


_STATUS_GONE = 410


_BUSY_STATUSES = frozenset({429, 503})


class WebhookEvent(StrEnum):
    """What tenants are told of."""

    SUCCEEDED = "task.succeeded"
    FAILED = "task.failed"

    @classmethod
    def for_state(cls, state: State) -> WebhookEvent:
        """The event that a task has ended so."""
        return cls.SUCCEEDED if state is State.SUCCEEDED else cls.FAILED


class DeliveryState(StrEnum):
    """Where a delivery stands."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
    DISABLED = "off"
    """Its address has said that it is gone, and is not asked again before an operator says so."""


def generate_secret() -> str:
    """Make a secret."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_NEW_SECRET_BYTES)).decode()


def parse_secret(text: str) -> bytes:
    """The bytes of a secret. Raises InvalidOptions, without it, for what is none."""
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(SECRET_PREFIX) or not _MIN_SECRET_BYTES <= len(key) <= _MAX_SECRET_BYTES:
        wanted = f"must be {SECRET_PREFIX} and the base64 of {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} random bytes"
        raise InvalidOptions([FieldError("webhook.secret", wanted)])
    return key


def event_id(reservation: str) -> str:
    """The id of the end of a task, by its reservation."""
    return _EVENT_ID_PREFIX + reservation


def parse_event_id(event: str) -> str | None:
    """The reservation of the task whose end an id stands for; None for what is no id."""
    found = _EVENT_ID.fullmatch(event)
    return found[1] if found else None


def sign_headers(message_id: str, now: float, body: bytes, keys: Sequence[bytes]) -> dict[str, str]:
    """What an attempt at `now` (seconds) is sent with: whose event it is, when it was sent, and who vouches for it."""
    at = str(int(now))
    signed = b".".join([message_id.encode(), at.encode(), body])
    signatures = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": at,
        "webhook-signature": " ".join(f"v1,{each}" for each in signatures),
    }


def classify_response(status: int | None) -> DeliveryState:
    """What an answer means for a delivery; None is no answer. Still pending if it is to be tried again."""
    if status is not None and 200 <= status < 300:
        return DeliveryState.DELIVERED
    return DeliveryState.DISABLED if status == _STATUS_GONE else DeliveryState.PENDING


def retry_delay(
    attempts: int, jitter: float, status: int | None = None, retry_after: float | None = None
) -> float | None:
    """How many seconds to wait after so many attempts that failed; None if that was the last.

    `chance`, from 0 to 1, makes it a little shorter, so that what failed together is not tried again together. What
    a receiver that is busy asks for in `retry_after` is respected, up to an hour.
    """
    if attempts > len(RETRY_SECONDS):
        return None
    wait = RETRY_SECONDS[attempts - 1] * (1 - _JITTER_RATIO * jitter)
    asked = min(retry_after or 0, MAX_RETRY_AFTER_SECONDS) if status in _BUSY_STATUSES else 0
    return max(wait, asked)


def parse_url(field: str, text: str) -> str:
    """An address to send to, with its host in lower case. Raises InvalidOptions that names the field."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port  # reading them is what checks them
        bracketed = "[" in parts.netloc and IPv6Address(host or "")
    except ValueError:
        raise _invalid_url(field) from None
    plain = re.fullmatch(r"[!-~]+", text) and "\\" not in text and "@" not in parts.netloc and "#" not in text
    if not plain or not host or parts.scheme not in {"http", "https"} or len(text) > MAX_URL_CHARS:
        raise _invalid_url(field)
    if not (_HOST_PATTERN.fullmatch(host) or (bracketed and not bracketed.scope_id)):
        raise _invalid_url(field)
    return parts._replace(netloc=parts.netloc.lower(), path=parts.path or "/").geturl()


def parse_allow_list(field: str, entries: Sequence[str]) -> tuple[str, ...]:
    """Hosts and networks, each as it is compared. Raises InvalidOptions that names each that is neither."""
    allowed, faults = [], []
    for place, entry in enumerate(entries):
        network = parse_network(entry)
        if network:
            allowed.append(str(network))
        elif _HOST_PATTERN.fullmatch(entry.lower()) and "/" not in entry:
            allowed.append(entry.lower())
        else:
            faults.append(FieldError(f"{field}[{place}]", "must be a host, or a network such as 10.0.0.0/8"))
    if faults:
        raise InvalidOptions(faults)
    return tuple(dict.fromkeys(allowed))


def resolve_webhook_url(webhook: Webhook, requested: str | None) -> str | None:
    """The address that a task asks for, if it may. Raises InvalidOptions that names the field."""
    if requested is None:
        return None
    url = parse_url("webhook_url", requested)
    if not webhook.allows_url(url):
        fault = "must be at a host that the operators of the gateway have allowed you"
        raise InvalidOptions([FieldError("webhook_url", fault)])
    return url


def _invalid_url(field: str) -> InvalidOptions:
    wanted = (
        f"must be a URL such as https://host/path, at most {MAX_URL_CHARS} characters long, "
        "without credentials or fragment"
    )
    return InvalidOptions([FieldError(field, wanted)])
