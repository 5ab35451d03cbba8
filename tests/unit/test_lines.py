"""In development a line of the log can be read at a glance."""

from __future__ import annotations

import re

from service.telemetry.logging import ANSWERED, REQUEST_ENDED
from tests.support.log import everything_logged
from tests.unit.asgi import call
from tests.unit.test_edge import Watched


def shown(event: str, **fields: object) -> str:
    """An event as a line to read, without its time."""
    with everything_logged(json=False) as written:
        written.logger.info(event, **fields)
        return re.sub(r"^[\d:.]{12} \[info +\] ", "", written.text.rstrip())


def test_a_request_reads_as_usual() -> None:
    """A request is told as everybody tells requests, then with what matters, and without what is as always."""
    line = shown(
        REQUEST_ENDED,
        method="GET",
        path="/v1/quota",
        status=200,
        seconds=0.25,
        tenant="shop",
        outcome=ANSWERED,
        route="/v1/quota",
        port="tenants",
    )
    assert line.split() == ["GET", "/v1/quota", "200", "seconds=0.25", "tenant=shop"]


async def test_what_the_edge_tells_can_be_shown() -> None:
    """The line that the edge writes has all that a line to read is made of, and its outcome where it is unusual."""
    watched = Watched()
    await call(watched.app, "GET", "/nowhere")
    told = watched.line
    told.pop("level")
    line = shown(told.pop("event"), **told)
    assert line.startswith("GET /nowhere 404 ")
    assert "outcome=not-found" in line


def test_fields_stand_in_the_order_of_their_telling() -> None:
    """Fields are not sorted: what is told first matters most."""
    assert shown("thing.done", zebra=1, ape=2, none=None).split() == ["thing.done", "zebra=1", "ape=2"]
