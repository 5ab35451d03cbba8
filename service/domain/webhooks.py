"""Rules of webhooks: secrets, signatures (Standard Webhooks 1.0.0), URLs and retries."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Sequence
from enum import StrEnum
from ipaddress import IPv6Address
from urllib.parse import urlsplit

from service.domain.errors import FieldError, InvalidOptions
from service.domain.hosts import (
    HOST_NAME,
    is_cleartext,
    is_metadata,
    is_private_host,
    is_public,
    parse_destination,
    parse_ip,
    url_address,
    wide_network_warnings,
)
from service.domain.tasks import State
from service.domain.tenants import Webhook

SECRET_PREFIX = "whsec_"  # noqa: S105 - a public prefix by which scanners recognise a leaked secret
_NEW_SECRET_BYTES = 32
_MIN_SECRET_BYTES, _MAX_SECRET_BYTES = 24, 64
_EVENT_ID_PREFIX = "msg_"
_EVENT_ID = re.compile(rf"{_EVENT_ID_PREFIX}([0-9a-f]{{32}})")
MAX_URL_CHARS = 2_048
MAX_ALLOW_ENTRIES = 100
RETRY_SECONDS = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 28_800)
"""Delay after each failed attempt; after the last one the delivery fails."""
MAX_RETRY_AFTER_SECONDS = 3_600
_JITTER_RATIO = 0.2
_STATUS_GONE = 410
_BUSY_STATUSES = frozenset({429, 503})


class WebhookEvent(StrEnum):
    SUCCEEDED = "task.succeeded"
    FAILED = "task.failed"
    QUOTA_THRESHOLD = "quota.threshold"

    @classmethod
    def for_state(cls, state: State) -> WebhookEvent:
        return cls.SUCCEEDED if state is State.SUCCEEDED else cls.FAILED


class DeliveryState(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
    DISABLED = "off"
    """The URL answered 410: nothing is sent to it until an operator enables it."""


def generate_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_NEW_SECRET_BYTES)).decode()


def parse_secret(text: str) -> bytes:
    """Decode a secret. Raises InvalidOptions, whose text does not contain it."""
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not text.startswith(SECRET_PREFIX) or not _MIN_SECRET_BYTES <= len(key) <= _MAX_SECRET_BYTES:
        expected = f"must be {SECRET_PREFIX} and the base64 of {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} random bytes"
        raise InvalidOptions([FieldError("webhook.secret", expected)])
    return key


def event_id(delivery: str) -> str:
    """Return the id of a delivery's event, which stays the same in every attempt."""
    return _EVENT_ID_PREFIX + delivery


def parse_event_id(event: str) -> str | None:
    """Return the delivery of an event id; None if it is invalid."""
    match = _EVENT_ID.fullmatch(event)
    return match[1] if match else None


def sign_headers(message_id: str, now: float, body: bytes, keys: Sequence[bytes]) -> dict[str, str]:
    """Build the signed headers of an attempt at `now` (seconds since the epoch), one signature per key."""
    timestamp = str(int(now))
    content = b".".join([message_id.encode(), timestamp.encode(), body])
    signatures = [base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in keys]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def classify_response(status: int | None) -> DeliveryState:
    """Classify a status (None: no response). PENDING means that a retry may help."""
    if status is not None and 200 <= status < 300:
        return DeliveryState.DELIVERED
    return DeliveryState.DISABLED if status == _STATUS_GONE else DeliveryState.PENDING


def retry_delay(
    attempts: int, jitter: float, status: int | None = None, retry_after: float | None = None
) -> float | None:
    """Return the seconds until the next attempt; None if this was the last one.

    `jitter`, from 0 to 1, shortens the delay, so that joint failures are not retried together. `retry_after` of a busy
    receiver is honoured up to an hour.
    """
    if attempts > len(RETRY_SECONDS):
        return None
    delay = RETRY_SECONDS[attempts - 1] * (1 - _JITTER_RATIO * jitter)
    requested = min(retry_after or 0, MAX_RETRY_AFTER_SECONDS) if status in _BUSY_STATUSES else 0
    return max(delay, requested)


def parse_url(field: str, text: str, max_chars: int = MAX_URL_CHARS) -> str:
    """Validate and normalise a URL to call. Raises InvalidOptions, also if its host is a metadata service."""
    rule = (
        f"must be a URL such as https://host/path, at most {max_chars} characters long, without credentials or fragment"
    )
    error = InvalidOptions([FieldError(field, rule)])
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port  # reading the port validates it
        bracketed = "[" in parts.netloc and IPv6Address(host or "")
    except ValueError:
        raise error from None
    is_plain = re.fullmatch(r"[!-~]+", text) and "\\" not in text and "@" not in parts.netloc and "#" not in text
    is_host = HOST_NAME.fullmatch(host or "") or (bracketed and not bracketed.scope_id)
    if not is_plain or not is_host or parts.scheme not in {"http", "https"} or len(text) > max_chars:
        raise error
    ip = parse_ip(host or "")
    if ip and is_metadata(ip):
        raise InvalidOptions([FieldError(field, "must not be the address of a metadata service")])
    return parts._replace(netloc=parts.netloc.lower(), path=parts.path or "/").geturl()


def parse_allow_list(field: str, entries: Sequence[str]) -> tuple[str, ...]:
    """Normalise hosts and networks. Raises InvalidOptions with all invalid entries."""
    destinations = [parse_destination(entry) for entry in entries]
    rule = "must be a host, or a network such as 10.0.0.0/8; with a port, such as host:8443, unless it is 80 or 443"
    errors = [FieldError(f"{field}[{index}]", rule) for index, parsed in enumerate(destinations) if parsed is None]
    if errors:
        raise InvalidOptions(errors)
    return tuple(dict.fromkeys(map(str, destinations)))


def check_address(field: str, webhook: Webhook) -> None:
    """Raise InvalidOptions if the host of the URL is an address to which nothing may be sent."""
    host, port = url_address(webhook.url or "")
    ip = parse_ip(host)
    if ip and not is_public(ip) and not webhook.allows_address(ip, port):
        rule = "must be at a public address, or at one of a network in `allow`, with its port unless that is 80 or 443"
        raise InvalidOptions([FieldError(field, rule)])


def webhook_warnings(webhook: Webhook, private_domains: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield fields with questionable values, each with a warning."""
    if webhook.url is None:
        return
    if is_cleartext(webhook.url, private_domains):
        yield "url", "has no TLS: anyone on the network path can read the events, with the links to results"
    yield from (("allow", warning) for warning in wide_network_warnings(webhook.allow))
    if not any(entry.network for entry in webhook.destinations()) and is_private_host(
        url_address(webhook.url)[0], private_domains
    ):
        yield "url", "is at a private host, but allow has no network: nothing is delivered"


def resolve_webhook_url(webhook: Webhook, requested: str | None) -> str | None:
    """Return the URL a task asks for. Raises InvalidOptions if the tenant may not use it."""
    if requested is None:
        return None
    url = parse_url("webhook_url", requested)
    if not webhook.allows_url(url):
        detail = "must be at a host and port that the operators of the gateway have allowed you"
        raise InvalidOptions([FieldError("webhook_url", detail)])
    return url
