"""Parsing of `traceparent`."""

from __future__ import annotations

import pytest

from service.telemetry.tracing import parse_trace_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


def _headers(*values: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"gateway"), *((b"traceparent", item.encode()) for item in values)]


@pytest.mark.parametrize("flags", ["00", "01", "02", "ff"])
def test_sampled_flag(flags: str) -> None:
    assert parse_trace_id(_headers(f"00-{TRACE}-{SPAN}-{flags}")) == TRACE


@pytest.mark.parametrize(
    "header", [f"01-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-", f"fe-{TRACE}-{SPAN}-01-what-else"]
)
def test_later_versions(header: str) -> None:
    assert parse_trace_id(_headers(header)) == TRACE


def test_surrounding_spaces() -> None:
    assert parse_trace_id(_headers(f" \t{TRACEPARENT} ")) == TRACE


@pytest.mark.parametrize(
    "header",
    [
        "",
        "what",
        TRACE,
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-001",
        f"00-{TRACE}-{SPAN}-0g",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01more",
        f"cc-{TRACE}-{SPAN}-01more",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"000-{TRACE}-{SPAN}-01",
        f"0G-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE}-{SPAN[:-1]}-01",
        f"00-{TRACE}-{SPAN}0-01",
        f"00_{TRACE}_{SPAN}_01",
        f"{TRACEPARENT},{TRACEPARENT}",
        f"{TRACEPARENT}\n",
        f"00-{'٣' * 32}-{SPAN}-01",
    ],
)
def test_invalid_headers(header: str) -> None:
    assert parse_trace_id(_headers(header)) is None


def test_several_headers() -> None:
    assert parse_trace_id(_headers(TRACEPARENT, TRACEPARENT)) is None


def test_no_header() -> None:
    assert parse_trace_id(_headers()) is None
