"""Checks of tasks, and secrets of the upstream client."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from structlog.testing import capture_logs

from service.clients import upstream
from service.clients.upstream import UpstreamClient, UpstreamOperation
from service.domain.tasks import DEFAULT_CATALOGUE
from service.domain.tenants import Account
from service.usecases.ports import CheckOutcome
from tests.contract.client import ACCOUNT, CIPHER, USER_KEY, open_caller
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    Handler,
    http_response,
    never_reply,
    redirect_to_self,
    reply_and_close,
    reply_with,
    reset_after_request,
    run_server,
    vendor_response,
)


async def test_checks_reuse_their_connection() -> None:
    async with (
        run_server(reply_with(vendor_response(err_code=0, status="Pending"))) as peer,
        open_caller(peer.url) as caller,
    ):
        for _ in range(3):
            assert (await caller.check()).outcome is CheckOutcome.RUNNING
    assert peer.connections == 1
    head, body = peer.requests[0]
    assert head.startswith(b"POST /api/check_task_status HTTP/1.1\r\n")
    assert body == b"user_key=hush-hush-key&task_id=t-1"


@pytest.mark.parametrize(
    ("serve", "answered"),
    [
        (reply_with(vendor_response(err_code=0, status="Completed", images_url="http://x/y")), CheckOutcome.SUCCEEDED),
        (reply_with(vendor_response(err_code=0, status="Failed")), CheckOutcome.FAILED),
        (reply_with(vendor_response(err_code=1, err_msg="任务未找到或状态未知")), CheckOutcome.NOT_FOUND),
        (reply_with(http_response(b"<html>", 502)), CheckOutcome.NO_RESPONSE),
        (reply_with(http_response(b"", 404)), CheckOutcome.NO_RESPONSE),
        (reply_with(http_response(b"x" * 70_000)), CheckOutcome.NO_RESPONSE),
        (reset_after_request, CheckOutcome.NO_RESPONSE),
        (reply_and_close(ACCEPTED_RESPONSE[:20]), CheckOutcome.NO_RESPONSE),
        (redirect_to_self, CheckOutcome.NO_RESPONSE),
    ],
)
async def test_checks(serve: Handler, answered: CheckOutcome) -> None:
    """A check is sent once, and returns the answer, or that there was none."""
    async with run_server(serve) as peer, open_caller(peer.url) as caller:
        assert (await caller.check()).outcome is answered
        assert caller.observations == [(UpstreamOperation.CHECK, answered)]
    assert len(peer.requests) == 1


async def test_unusable_links_are_logged_once() -> None:
    """A bad link is logged once per task and field, without the link."""
    first = vendor_response(err_code=0, status="Completed", images_url="ftp://secret/y", vector_url={"a": 1})
    with capture_logs() as logs:
        async with run_server(reply_with(first)) as peer, open_caller(peer.url) as caller:
            for upstream_id in ("t-1", "t-1", "t-2"):
                assert (await caller.check(upstream_id)).outcome is CheckOutcome.INVALID
    assert [(log["event"], log["field"], log["type"]) for log in logs] == [
        ("artifact.invalid_link", "images_url", "str"),
        ("artifact.invalid_link", "vector_url", "dict"),
    ] * 2
    assert "secret" not in str(logs)


async def test_links_with_the_key() -> None:
    """A link that contains the account's key is returned without it, or not at all."""
    finished = vendor_response(
        err_code=0, status="Completed", images_url=f"/1.png?k={USER_KEY}", grid_url=f"/{USER_KEY.encode().hex()}.png"
    )
    with capture_logs() as logs:
        async with run_server(reply_with(finished)) as peer, open_caller(peer.url) as caller:
            check = await caller.check()
    assert [artifact.url for artifact in check.artifacts] == [f"{peer.url}/1.png?k=%7Buser_key%7D"]
    assert [(log["event"], log["field"]) for log in logs] == [("artifact.invalid_link", "grid_url")]
    assert USER_KEY not in repr(check)


async def test_relative_links() -> None:
    """A link is relative to the URL called, of the account's own upstream."""
    finished = vendor_response(err_code=0, status="Completed", images_url="/files/1.png", grid_url="2.png")
    async with run_server(reply_with(finished)) as peer, open_caller("http://127.0.0.1:1") as caller:
        account = Account(1, "other", ACCOUNT.user_key, base_url=f"{peer.url}/deep/")
        result = (await caller.check(account=account)).artifacts
    assert [item.url for item in result] == [f"{peer.url}/files/1.png", f"{peer.url}/deep/api/2.png"]


async def test_check_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CHECK_SECONDS", 0.1)
    async with run_server(never_reply) as peer, open_caller(peer.url) as caller, asyncio.timeout(5):
        assert (await caller.check()).outcome is CheckOutcome.NO_RESPONSE


async def test_no_cookies() -> None:
    pending = http_response(b'{"err_code": 0, "status": "x"}', Set_Cookie="a=b; Path=/")
    async with run_server(reply_with(pending)) as peer, open_caller(peer.url) as caller:
        await caller.check()
        await caller.check()
    assert b"cookie" not in peer.requests[1][0].lower()


@pytest.mark.parametrize(
    "serve",
    [
        reply_with(vendor_response(err_code=1, err_msg=f"任务提交失败:bad key {USER_KEY}!")),
        reply_with(vendor_response(err_code=0, status="Failed", err_msg=f"bad key {USER_KEY}!")),
        reply_with(http_response(json.dumps({"err_code": 1, "err_msg": f"bad key {USER_KEY.upper()}"}).encode(), 400)),
        reply_with(vendor_response(err_code=0, status="Failed", err_msg=f"bad key {USER_KEY.encode().hex()}!")),
        reply_with(ACCEPTED_RESPONSE),
        reset_after_request,
    ],
)
async def test_key_stays_secret(serve: Handler, caplog: pytest.LogCaptureFixture) -> None:
    """The key is in no log line, even at debug level, in no result and in no repr."""
    caplog.set_level(logging.DEBUG)
    with capture_logs() as logs:
        async with run_server(serve) as peer, open_caller(peer.url) as caller:
            text = [await caller.submit(), await caller.check(), vars(caller.client), logs, caplog.text]
    assert len(peer.requests) == 2
    assert USER_KEY not in repr(text).lower()
    assert USER_KEY.encode().hex() not in repr(text)


async def test_failing_observer() -> None:
    """A failure while counting a call does not lose its result."""

    def observe(*_: object) -> None:
        raise RuntimeError("a broken observer")

    async with UpstreamClient("http://127.0.0.1:1", CIPHER, DEFAULT_CATALOGUE, on_call=observe) as client:
        assert (await client.check(ACCOUNT, "t-1")).outcome is CheckOutcome.NO_RESPONSE
