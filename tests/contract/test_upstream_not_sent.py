"""Submits that were certainly not sent: no connection, no free slot, open circuit breaker."""

from __future__ import annotations

import asyncio
import errno
import os
import time

import httpx2
import pytest
from anyio._backends._asyncio import SocketStream

from service.clients import http
from service.clients.http import BREAKER_THRESHOLD
from service.clients.upstream import UpstreamOperation
from service.domain.tenants import Account
from service.usecases.ports import CheckOutcome, SubmitOutcome, SubmitResult
from tests.contract.client import ACCOUNT, open_caller
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    never_reply,
    reply_with,
    reset_after_request,
    run_server,
    unreachable_address,
)
from tests.support.network import reserve_port

ACCEPTED, UNKNOWN, NOT_SENT = SubmitOutcome.ACCEPTED, SubmitOutcome.UNKNOWN, SubmitOutcome.NOT_SENT


async def test_slow_connect_ends_at_the_deadline_or_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with unreachable_address() as url:
        async with open_caller(url) as caller, asyncio.timeout(20):
            assert (await caller.submit(seconds=0.1)).outcome is NOT_SENT
            monkeypatch.setattr(http, "_TIMEOUTS", httpx2.Timeout(5, connect=0.1).as_dict())
            assert (await caller.submit(seconds=60)).outcome is NOT_SENT


async def test_submit_that_waits_for_a_slot_beyond_its_deadline_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REQUESTS", 1)
    async with run_server(never_reply) as peer, open_caller(peer.url) as caller:
        first = asyncio.create_task(caller.submit(seconds=60))
        await peer.request_received.wait()
        assert (await caller.submit(seconds=0.1)).outcome is NOT_SENT
        checking = asyncio.create_task(caller.check())  # has slots of its own
        while len(peer.requests) < 2:
            await asyncio.sleep(0)
        late = asyncio.create_task(caller.submit(seconds=0.05))
        await asyncio.sleep(0)
        time.sleep(0.2)  # to the event loop the same as a stopped process
        first.cancel()
        assert (await late).outcome is NOT_SENT
        checking.cancel()
    assert len(peer.requests) == 2


async def test_cancelled_submit_releases_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REQUESTS", 1)
    async with run_server(never_reply) as peer, open_caller(peer.url) as caller:
        head, waiting = asyncio.create_task(caller.submit()), asyncio.create_task(caller.submit())
        await peer.request_received.wait()
        for task in (waiting, head):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        peer.request_received.clear()
        last = asyncio.create_task(caller.submit())
        await peer.request_received.wait()
        last.cancel()
        await asyncio.wait({last})
        assert caller.observations == [(UpstreamOperation.SUBMIT, UNKNOWN)] * 3


async def test_breaker_stops_submits_and_checks_of_an_unreachable_upstream() -> None:
    port = reserve_port()
    async with open_caller(f"http://127.0.0.1:{port}") as caller:
        for _ in range(BREAKER_THRESHOLD):
            await caller.submit()
        async with (
            run_server(reply_with(ACCEPTED_RESPONSE), port=port) as peer,
            run_server(reply_with(ACCEPTED_RESPONSE)) as other,
        ):
            assert (await caller.submit()).outcome is NOT_SENT
            assert (await caller.check()).outcome is CheckOutcome.NO_RESPONSE
            assert peer.connections == 0
            elsewhere = Account(2, "other", ACCOUNT.user_key, base_url=other.url)
            assert (await caller.submit(account=elsewhere)).outcome is ACCEPTED


async def test_a_connected_trial_admits_others_before_its_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_SECONDS", 0.0)
    port, pending = reserve_port(), list[asyncio.Task[SubmitResult]]()
    async with open_caller(f"http://127.0.0.1:{port}") as caller:
        for _ in range(BREAKER_THRESHOLD):
            assert (await caller.submit()).outcome is NOT_SENT
        async with run_server(never_reply, port=port) as peer:
            for count in (1, 2):
                peer.request_received.clear()
                pending.append(asyncio.create_task(caller.submit()))
                await peer.request_received.wait()
                assert len(peer.requests) == count
        assert [(await submit).outcome for submit in pending] == [UNKNOWN] * 2


async def test_lost_responses_and_short_deadlines_do_not_open_the_breaker() -> None:
    async with run_server(reset_after_request) as peer, open_caller(peer.url) as caller:
        for _ in range(2 * BREAKER_THRESHOLD):
            assert (await caller.submit()).outcome is UNKNOWN
    with unreachable_address() as url:
        async with open_caller(url) as caller:
            for _ in range(2 * BREAKER_THRESHOLD):
                await caller.submit(seconds=0.01)
            trying = asyncio.create_task(caller.submit())
            assert not (await asyncio.wait({trying}, timeout=0.1))[0]
            trying.cancel()


async def test_local_error_is_unknown_only_after_sending_began(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(_: SocketStream, _item: bytes) -> None:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        assert (await caller.submit(seconds=0)).outcome is NOT_SENT
        assert peer.connections == 0
        monkeypatch.setattr(SocketStream, "send", send)
        assert (await caller.submit()).outcome is UNKNOWN
