"""The console log of development."""

from __future__ import annotations

import re

from service.telemetry.logging import OUTCOME_ANSWERED, REQUEST_EVENT
from tests.support.log_capture import capture_log
from tests.unit.asgi_client import call_app
from tests.unit.test_request_middleware import ObservedApp


def render_line(event: str, **fields: object) -> str:
    with capture_log(json=False) as written:
        written.logger.info(event, **fields)
        return re.sub(r"^[\d:.]{12} \[info +\] ", "", written.text.rstrip())


def test_request_line() -> None:
    line = render_line(
        REQUEST_EVENT,
        method="GET",
        path="/v1/quota",
        status=200,
        seconds=0.25,
        tenant="shop",
        outcome=OUTCOME_ANSWERED,
        route="/v1/quota",
        port="tenants",
    )
    assert line.split() == ["GET", "/v1/quota", "200", "seconds=0.25", "tenant=shop"]


async def test_access_log_event_has_the_fields_of_the_line() -> None:
    watched = ObservedApp()
    await call_app(watched.app, "GET", "/nowhere")
    event = watched.access_line
    event.pop("level")
    line = render_line(event.pop("event"), **event)
    assert line.startswith("GET /nowhere 404 ")
    assert "outcome=not-found" in line


def test_field_order_is_kept() -> None:
    assert render_line("thing.done", zebra=1, ape=2, none=None).split() == ["thing.done", "zebra=1", "ape=2"]
