"""Webhook URLs, signatures and retries."""

from __future__ import annotations

import base64
import time
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from service.domain import tenants, webhooks
from service.domain.errors import InvalidOptions
from service.domain.tenants import Webhook

NETWORKS = ("10.0.0.0/8", "127.0.0.0/8:9", "::1/128", "fd00::/8:9")
HOOK = Webhook("https://hooks.test:8443/ended?key=1", ("other.test", "other.test:81", *NETWORKS))
KEYS = st.binary(min_size=24, max_size=64)


@given(st.lists(KEYS, min_size=1, max_size=2), st.text().map(str.encode))
def test_signature_verifies(secrets: list[bytes], body: bytes) -> None:
    headers = webhooks.sign_headers("msg_1", time.time(), body, secrets)
    earlier = str(int(headers["webhook-timestamp"]) - 1)
    for secret in secrets:
        assert webhooks.parse_secret("whsec_" + base64.b64encode(secret).decode()) == secret
        Verifier(secret).verify(body, headers, json_parse=False)
    for key, content, changes in (
        (secrets[-1], body, {"webhook-id": "msg_2"}),
        (secrets[-1], body, {"webhook-timestamp": earlier}),
        (secrets[-1], body + b" ", {}),
        (b"of another tenant", body, {}),
    ):
        with pytest.raises(WebhookVerificationError):
            Verifier(key).verify(content, headers | changes, json_parse=False)


@pytest.mark.parametrize("text", ["", "a" * 44, "whsec_c2hvcnQ=", "whsec_" + "A" * 88, "whsec_" + "é" * 44])
def test_invalid_secret_is_not_repeated(text: str) -> None:
    with pytest.raises(InvalidOptions) as refused:
        webhooks.parse_secret(text)
    assert refused.value.errors[0].field == "webhook.secret"
    assert len(text) <= 10 or text not in str(refused.value)


@given(st.integers(1, 10), st.floats(0, 1))
def test_backoff_increases_up_to_a_day(attempts: int, jitter: float) -> None:
    wait = webhooks.retry_delay(attempts, jitter)
    assert wait is not None
    assert webhooks.RETRY_SECONDS[attempts - 1] * 0.8 <= wait <= webhooks.RETRY_SECONDS[attempts - 1]
    waits = [webhooks.retry_delay(number, 0) or 0 for number in range(1, 11)]
    assert waits == sorted(waits)
    assert 23.5 * 3_600 < sum(waits) <= 24 * 3_600
    assert webhooks.retry_delay(11, jitter) is None


@pytest.mark.parametrize(
    ("status", "asked", "wait"),
    [(503, 60, 60), (429, 60, 60), (503, 2, 5), (503, 10**9, 3_600), (500, 60, 5), (None, None, 5)],
)
def test_retry_after_is_bounded(status: int | None, asked: float | None, wait: float) -> None:
    assert webhooks.retry_delay(1, 0, status, asked) == wait


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://Hooks.Test/Ended?Key=1", "https://hooks.test/Ended?Key=1"),
        ("HTTP://hooks.test:8080", "http://hooks.test:8080/"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        *((text, None) for text in ("", "hooks.test", "//hooks.test/", "ftp://hooks.test/", "https:///x")),
        *((f"http://{text}", None) for text in ("hooks.test:x/", "user:secret@hooks.test/", "hooks.test/#x", "h t/")),
        *((f"http://{text}", None) for text in ("hooks.test\\@other.test/", "[::1", "[fe80::1%eth0]/")),
        *((f"http://{text}", None) for text in ("hooks.test/\n", "顾客.test/", "-x/", "a_/")),
        ("https://hooks.test/" + "x" * 2_048, None),
    ],
)
def test_urls_are_normalised_or_refused(text: str, url: str | None) -> None:
    if url:
        assert webhooks.parse_url("webhook_url", text) == url
        return
    with pytest.raises(InvalidOptions) as refused:
        webhooks.parse_url("webhook_url", text)
    assert [error.field for error in refused.value.errors] == ["webhook_url"]


ALLOWED = ["hooks.test:8443/x", "other.test/", "other.test:443/", "other.test:81/", "10.1.2.3/", "127.0.0.1:9/"]
ALLOWED += ["[::1]/", "[fd00::5]:9/", "167837955/"]
DISALLOWED = ["hooks.test.evil.test/", "sub.other.test/", "11.1.2.3/", "[::2]/", "0/", "hooks.test/", "other.test:82/"]
DISALLOWED += ["10.1.2.3:9/", "127.0.0.1/", "[::1]:9/", "[fd00::5]/", "other.test:0/"]


def test_a_task_may_name_allowed_urls_only() -> None:
    without_url = Webhook(allow=HOOK.allow)
    for address in ALLOWED:
        assert webhooks.resolve_webhook_url(HOOK, f"http://{address}") == f"http://{address}"
    for hook, address in (*((HOOK, address) for address in DISALLOWED), (without_url, ALLOWED[0])):
        with pytest.raises(InvalidOptions):
            webhooks.resolve_webhook_url(hook, f"http://{address}")


def test_allow_list() -> None:
    entries = ["Other.Test", "10.0.0.0/8", "127.0.0.1", "::1", "other.test", "Other.Test:81", "10.0.0.0/8:81"]
    entries += ["[::1]:81", "fd00::/8:81", "127.1"]
    expected = ["other.test", "10.0.0.0/8", "127.0.0.1/32", "::1/128", "other.test:81", "10.0.0.0/8:81"]
    expected += ["::1/128:81", "fd00::/8:81"]
    for texts in (entries, expected):
        assert list(webhooks.parse_allow_list("webhook.allow", texts)) == expected
    wrong = [
        "10.0.0.1/8",
        "http://x.test",
        "*.test",
        "a.test/x",
        "a.test:",
        "a.test:0",
        "a.test:65536",
        "[::1",
        "::1/8:1",
    ]
    with pytest.raises(InvalidOptions) as refused:
        webhooks.parse_allow_list("webhook.allow", ["fine.test", *wrong])
    assert [error.field for error in refused.value.errors] == [f"webhook.allow[{index + 1}]" for index in range(9)]


@pytest.mark.parametrize(
    ("ip", "ports"),
    [
        ("10.1.2.3", {80, 443}),
        ("fd00::1", {9}),
        ("127.0.0.1", {9}),
        *((ip, set()) for ip in ("192.168.0.1", "fe80::1", "::ffff:127.0.0.1", "0.0.0.0")),
    ],
)
def test_private_addresses_by_network_only(ip: str, ports: set[int]) -> None:
    for port in (9, 80, 443, 8443):
        assert not Webhook("https://hooks.test/").allows_address(ip_address(ip), port)
        assert HOOK.allows_address(ip_address(ip), port) is (port in ports)


def test_disabled_urls_are_bounded() -> None:
    off = HOOK.with_disabled_url("https://hooks.test/ended?key=2")
    assert off.is_disabled("https://hooks.test/ended?key=1")
    for number in range(200):
        off = off.with_disabled_url(f"https://hooks.test/{number}").with_disabled_url("https://hooks.test/again")
    assert len(off.disabled_urls) == len(set(off.disabled_urls)) == tenants.MAX_DISABLED_URLS
    assert off.is_disabled("https://hooks.test/199")


@given(st.text(max_size=40))
def test_event_ids(text: str) -> None:
    reservation = "0123456789abcdef" * 2
    assert webhooks.parse_event_id(webhooks.event_id(reservation)) == reservation
    assert webhooks.parse_event_id(text) is None
