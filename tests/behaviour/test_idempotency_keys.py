"""Idempotency keys in headers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

import pytest
import structlog

from tests.behaviour.audit import UNREACHABLE_POLICIES, assert_nothing_happened
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.idempotent_requests import expect_created, expect_replayed, make_jpeg, submit_with_key
from tests.behaviour.legacy_client import LegacyClient
from tests.support.valkey import Valkey
from tests.unit.asgi_client import AsgiResponse, open_raw_connection, read_response
from tests.unit.multipart_forms import CONTENT_TYPE, encode_file, encode_form

SECRET = "Qx7fT2"
MALFORMED: Sequence[tuple[bytes, str]] = (
    (b"", "visible ASCII"),
    (b" \t ", "visible ASCII"),
    (b'""', "visible ASCII"),
    (b"Qx7fT2 Qx7fT2", "spaces"),
    (b"Qx7fT2\tQx7fT2", "visible ASCII"),
    (b'"Qx7fT2\tQx7fT2"', "visible ASCII"),
    (b"Qx7fT2\xe9", "visible ASCII"),
    ('"Qx7fT2é"'.encode(), "visible ASCII"),
    ("Qx7fT2图".encode(), "visible ASCII"),
    (b'"Qx7fT2', "quotes"),
    (b'Qx7fT2"', "quotes"),
    (b'"Qx7fT2"Qx7fT2"', "quotes"),
    (b'"Qx7fT2\\"', "quotes"),
    (b'"Qx7fT2\\n"', "visible ASCII"),
    (b"Qx7fT2\\", "backslashes"),
    (b'"Qx7fT2";q=1', "Nothing may follow"),
    (b"Qx7fT2;q=1", "semicolons"),
    (b'"Qx7fT2", "Qx7fT2"', "Nothing may follow"),
    (b"Qx7fT2,Qx7fT2", "commas"),
    (b"Qx7fT2" + b"x" * 250, "at most 255"),
    (b'"Qx7fT2' + b"x" * 250 + b'"', "at most 255"),
    (b'"Qx7fT2' + b"x" * 20_000, "visible ASCII"),
)
"""Header values, and a word that the detail of the problem must contain."""
UNPRINTABLE = [b'"Qx7fT2%c"' % character for character in (0, 1, 0x1B, 0x1F, 0x7F)]
"""Control characters, with which the HTTP server refuses the whole request."""


async def send_head_only(gateway: RunningGateway, *keys: bytes) -> AsgiResponse:
    """Send the head of a submission without a body."""
    body = encode_form(encode_file("image", make_jpeg()))
    lines = [b"POST /v1/tasks/vectorize HTTP/1.1", b"Host: gateway", b"Authorization: Bearer " + gateway.token.encode()]
    lines += [b"Content-Type: " + CONTENT_TYPE.encode(), b"Content-Length: %d" % len(body)]
    lines += [b"Idempotency-Key: " + key for key in keys]
    async with open_raw_connection(urlsplit(gateway.url).port or 0) as (reader, writer):
        writer.write(b"\r\n".join([*lines, b"", b""]))
        return await read_response(reader)


def assert_key_refused(response: AsgiResponse, word: str) -> None:
    """Assert that the problem explains the key and does not repeat it."""
    assert response.status == 400
    document = response.json()
    assert document["code"] == "idempotency-key-invalid"
    assert "Idempotency-Key" in document["detail"]
    assert word in document["detail"]
    assert SECRET not in repr((response.headers, response.body))


async def test_malformed_key_is_400_before_the_body(
    gateway: RunningGateway, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    with structlog.testing.capture_logs() as events, caplog.at_level(logging.DEBUG):
        for key, word in MALFORMED:
            assert_key_refused(await send_head_only(gateway, key), word)
        assert_key_refused(await send_head_only(gateway, b"Qx7fT2", b"Qx7fT2"), "one Idempotency-Key")
        assert_key_refused(await send_head_only(gateway, b'"Qx7fT2"', b""), "one Idempotency-Key")
        for key in UNPRINTABLE:
            assert (await send_head_only(gateway, key)).status == 400
    assert len([event for event in events if event.get("outcome") == "idempotency-key-invalid"]) == len(MALFORMED) + 2
    assert SECRET not in repr(events) + caplog.text
    await assert_nothing_happened(gateway, valkey)


async def test_keys_are_not_logged(gateway: RunningGateway, caplog: pytest.LogCaptureFixture) -> None:
    with structlog.testing.capture_logs() as events, caplog.at_level(logging.DEBUG):
        task = expect_created(await submit_with_key(gateway, key=SECRET))
        expect_replayed(await submit_with_key(gateway, key=SECRET), task)
        assert (await submit_with_key(gateway, key=SECRET, image=make_jpeg(b"b"))).status_code == 422
        await gateway.upstream.lose_next_response()
        assert [(await submit_with_key(gateway, key=f'"{SECRET} "')).status_code for _ in range(2)] == [504, 504]
    assert {"answered", "idempotency-key-reused", "submission-unknown"} <= {event.get("outcome") for event in events}
    assert SECRET not in repr(events) + caplog.text


async def test_quoted_and_bare_keys_are_equal(gateway: RunningGateway) -> None:
    task = expect_created(await submit_with_key(gateway, key='"a-key"'))
    expect_replayed(await submit_with_key(gateway, key="a-key"), task)
    spaced = expect_created(await submit_with_key(gateway, key=r'"a, \"key\"; \\"'))
    expect_replayed(await submit_with_key(gateway, key=r'"a, \"key\"; \\"'), spaced)
    assert await gateway.upstream.count_submits() == 2


async def test_longest_key(gateway: RunningGateway) -> None:
    tasks = [
        expect_created(await submit_with_key(gateway, key=key))["id"]
        for key in ("k" * 255, "k" * 254, "k" * 254 + "K", '"' + r"\"" * 255 + '"', '"' + r"\\" * 255 + '"')
    ]
    assert len(set(tasks)) == 5


async def test_keys_are_case_sensitive(gateway: RunningGateway) -> None:
    tasks = [
        expect_created(await submit_with_key(gateway, key=key))["id"]
        for key in ('"a-key"', '"A-key"', '"a-key "', '" a-key"')
    ]
    assert len(set(tasks)) == await gateway.upstream.count_submits() == 4


async def test_legacy_protocol_ignores_keys(gateway: RunningGateway) -> None:
    client = LegacyClient(gateway.http, gateway.url, gateway.token)
    responses = [
        await client.submit("submit_face_enhance_task", headers={"Idempotency-Key": key})
        for key in ('"a-key"', '"a-key"', '"never ended')
    ]
    assert [response["err_code"] for response in responses] == [0, 0, 0]
    assert len({response["task_id"] for response in responses}) == await gateway.upstream.count_submits() == 3
