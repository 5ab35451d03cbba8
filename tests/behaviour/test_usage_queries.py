"""Queries and formats of usage reports."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import pytest

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.usage_requests import (
    advance_to_next_window,
    expect_json,
    flatten_item,
    post_refund,
    read_csv_rows,
    read_usage,
    request_media_type,
    run_task,
    submit_and_lose_response,
)

PATHS = ("/v1/usage", "/admin/v1/usage")


async def test_csv_equals_json(gateway: RunningGateway) -> None:
    first = await advance_to_next_window(gateway)
    await run_task(gateway)
    expect_json(await post_refund(gateway, task=(await run_task(gateway))["id"], reason="=1+1"), 201)
    await submit_and_lose_response(gateway, "seamless")
    await advance_to_next_window(gateway)
    await run_task(gateway, "vectorize")
    heads = set()
    for path in PATHS:
        for groups in ("none", "kind", *(("tenant", "tenant,kind") if "admin" in path else ())):
            for interval in ("day", "month", "total"):
                address = f"{path}?from={first}&interval={interval}&group_by={groups}"
                items = expect_json(await request_media_type(gateway, address, "application/json"))["items"]
                rows = await read_csv_rows(gateway, address)
                assert rows == [flatten_item(item) for item in items]
                heads.add((path, *rows[0]))
    assert len(heads) == 2
    nothing = await request_media_type(gateway, f"{PATHS[0]}?to={first - timedelta(days=1)}", "text/csv")
    assert (PATHS[0], *nothing.text.removesuffix("\r\n").split(",")) in heads


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("text/csv", "text/csv"),
        ("TEXT/CSV", "text/csv"),
        ("text/*", "text/csv"),
        ("text/csv, */*", "text/csv"),
        ("text/csv;q=0.5, application/json", "application/json"),
        ("application/json;q=0.5, text/csv;q=0.6", "text/csv"),
        ("text/csv;q=0", "application/json"),
        ("text/csv;header=absent", "text/csv"),
        ("application/json, text/csv", "application/json"),
        ("image/png", "application/json"),
        ("text/csv;q=inf, application/json", "application/json"),
        (",;=", "application/json"),
        ("", "application/json"),
    ],
)
async def test_csv_needs_an_accept_header(gateway: RunningGateway, accept: str, media_type: str) -> None:
    for path in PATHS:
        response = await request_media_type(gateway, path, accept)
        assert response.status_code == 200
        assert response.headers["content-type"].partition(";")[0] == media_type
        assert response.headers["vary"] == "Accept"
        assert response.headers["cache-control"] == ("no-store" if "admin" in path else "private, no-cache")


@pytest.mark.parametrize("path", PATHS)
async def test_invalid_query(gateway: RunningGateway, path: str) -> None:
    today = date.fromisoformat((await read_usage(gateway))["to"])
    days = ["", "yesterday", "2026-1-1", "20260101", "2026-W01-1", "2026-02-30", "2026-01-01T00:00:00Z", "null"]
    days += ["٢٠٢٦-٠١-٠١", "0000-01-01", "0001-01-01", "9999-12-31", " 2026-01-01", "2026-01-01\n"]
    days += [str(today - timedelta(days=400)), str(today + timedelta(days=400))]
    faulty: dict[str, list[str]] = {
        "from": days,
        "to": days,
        "interval": ["", "week", "DAY", "null", "day,month"],
        "group_by": ["week", "kind,kind", "none,kind", ",", "Kind", "null", "kind,"],
        "form": [str(today)],
        "From": [str(today)],
        "limit": ["5"],
    }
    if "admin" in path:
        faulty["tenant"] = ["unknown", "", "SHOP", "shop\n", "null", "*"]
    else:
        faulty["group_by"] += ["tenant", "tenant,kind"]
        faulty["tenant"] = ["shop"]
    headers = {"Authorization": (await request_media_type(gateway, path, "*/*")).request.headers["authorization"]}
    address = (gateway.ops_url if "admin" in path else gateway.url) + path
    for field, values in faulty.items():
        for value in values:
            response = await gateway.http.get(address, params={field: value}, headers=headers)
            document = expect_problem(response, 422, "invalid-options")
            assert [error["field"] for error in document["errors"]] == [field], value
            assert all(error["detail"] for error in document["errors"])
    for field, value in (("from", str(today)), ("interval", "day"), ("group_by", "kind")):
        response = await gateway.http.get(f"{address}?{field}={value}&{field}={value}", headers=headers)
        assert expect_problem(response, 422, "invalid-options")["errors"] == [
            {"field": field, "detail": "is given more than once"}
        ]


async def test_date_ranges(gateway: RunningGateway) -> None:
    today = date.fromisoformat((await read_usage(gateway))["to"])

    async def request_range(first: int, last: int) -> Any:
        days = {"from": today + timedelta(days=first), "to": today + timedelta(days=last)}
        return await gateway.call("GET", "/v1/usage", params={name: str(day) for name, day in days.items()})

    for first, last in ((0, 0), (-399, 0), (0, 399), (-200, 199), (5, 9)):
        assert expect_json(await request_range(first, last))["items"] == []
    for first, last in ((0, -1), (-200, 200), (1, -399)):
        document = expect_problem(await request_range(first, last), 422, "invalid-options")
        assert [error["field"] for error in document["errors"]] == ["from"]
    document = expect_problem(await request_range(-400, 400), 422, "invalid-options")
    assert [error["field"] for error in document["errors"]] == ["from", "to"]
    assert str(today) in document["detail"]


async def test_usage_needs_a_token(gateway: RunningGateway) -> None:
    for query in ("", "?form=x"):
        expect_problem(await gateway.call("GET", f"/v1/usage{query}", token=""), 401, "unauthenticated")
        expect_problem(await gateway.http.get(f"{gateway.ops_url}/admin/v1/usage{query}"), 401, "unauthenticated")
    expect_problem(await gateway.call("GET", "/admin/v1/usage"), 404, "not-found")
