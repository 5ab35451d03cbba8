"""Invalid requests of tenants and operators: the right problem, and nothing is changed or spent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from service.api import params
from service.domain import tenants
from service.domain.tasks import MAX_METADATA_BYTES, Kind
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway
from tests.behaviour.requests import UNREACHABLE_POLICIES, assert_nothing_happened, expect_invalid, expect_problem
from tests.support.images import make_png
from tests.support.valkey import Valkey
from tests.unit.asgi_client import open_raw_connection

UPSCALE = "/v1/tasks/upscale"
FILE = ("picture.png", make_png(), "image/png")
TEXT = (None, "an image in words")

OPERATORS_BODIES = [
    ("PUT", "/accounts/main"),
    ("PUT", "/registry"),
    ("POST", "/tenants/shop/tokens"),
    ("POST", "/refunds"),
]
FAULTY_OPTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "upscale": {
        "scale": ["0.99", "8.01", "nan", "1e400", "0x2", " 2", "٢"],
        "steps": ["19", "25.5", "9" * 400],
        "vector": ["yes"],
        "prompt": ["很" * 2_001],
        "model": ["unknown-model"],
        "fit": ["0.5"],
        "metadata": ["{", "[]", '{"a": 1}', '{"a": "b", "a": "c"}', json.dumps({"a": "x" * MAX_METADATA_BYTES})],
    },
    "vectorize": {"colors": ["1", "five"]},
    "face-enhance": {"prompt": [""]},
    "seamless": {"fit": ["0.09", "0.91"]},
}
FAULTY_PARTS: list[tuple[list[tuple[str, Any]], str]] = [
    ([("prompt", (None, "a cat"))], "image"),
    ([("image", FILE), ("image", FILE)], "image"),
    ([("image", FILE), ("mask", FILE)], "mask"),
    ([("image", TEXT), ("image", FILE)], "image"),
    ([("image", FILE), ("prompt", ("prompt.txt", b"a cat"))], "prompt"),
    ([("image", FILE), ("prompt", (None, b"\xff"))], "prompt"),
    ([("image", FILE), ("prompt", (None, b"x", "text/plain; charset=nonsense"))], "prompt"),
]
INVALID_URLS: list[Any] = ["", "upstream.example", "//host", "http://:80", "http://host:99999", "http://[::1", 5]
INVALID_URLS += ["ftp://host", "http://u:password@host", "http://host/?q=1", "http://ho st", "http://bücher.example"]
INVALID_URLS += ["http://169.254.169.254", "http://0xA9FEA9FE:80/", "https://[fd00:ec2::254]", "http://%31.example"]
MONEY = (-1, 0.005, 1e11, True, "sNaN")
COUNTS = (-1, 0.5, 10**13, True, "many")
INVALID_ACCOUNTS: Mapping[str, Sequence[Any]] = {
    "user_key": ["", "a b", "a\n", "钥匙", "x" * 513, 5],
    "base_url": INVALID_URLS,
    "floor_count": [*COUNTS, 10**40, None],
    "floor_money": [*MONEY, "1e999999", None],
    "max_price": [None, []],
    "max_price.nonsense": [{"nonsense": 1}],
    "max_price.upscale": [{"upscale": value} for value in (0.005, -1, None)],
    "nonsense": [1],
}
INVALID_TENANTS: Mapping[str, Sequence[Any]] = {
    "accounts": [None, "main", ["unknown"], ["main", "main"], ["main"] * 101],
    "accounts[0]": [["Main"], [5]],
    "limits": [5, [{"window": "day", "tasks": 1}, {"window": "day", "money": 1}]],
    "limits[0]": [[{"window": "day"}], [5]],
    "limits[0].window": [[{"tasks": 1}], [{"window": "week", "tasks": 1}]],
    "limits[0].tasks": [[{"window": "day", "tasks": value}] for value in COUNTS],
    "limits[0].money": [[{"window": "day", "money": value}] for value in MONEY],
    "limits[0].warn_at": [[{"window": "day", "tasks": 1, "warn_at": value}] for value in (80, [80, 80], [1] * 11)],
    "limits[0].warn_at[0]": [[{"window": "day", "tasks": 1, "warn_at": [value]}] for value in (0, 101, -1, 1.5)],
    "limits[0].nonsense": [[{"window": "day", "tasks": 1, "nonsense": 1}]],
    "max_active": COUNTS,
    "spending_mode": ["all", None],
    "kinds": ["upscale", ["upscale", "upscale"]],
    "kinds[0]": [["nonsense"]],
    "disabled": ["perhaps"],
    "state": [None, "off"],
    "note": ["x" * 2_001],
    "webhook.url": [{"allow": ["x"]}],
    "nonsense": [1],
}
INVALID_TOKENS: Mapping[str, Sequence[Any]] = {
    "label": ["x" * 201, 5],
    "expires_at": ["soon", "2030-01-01T00:00:00", "0001-01-01T00:00:00+14:00", "2020-01-01T00:00:00Z"],
    "nonsense": [1],
}


@pytest.fixture(autouse=True)
async def _assert_nothing_happened(gateway: RunningGateway, valkey: Valkey) -> AsyncIterator[None]:
    """Assert after each test that nothing was spent and no setting changed."""
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    before = gateway.services.registry.current
    yield
    after = gateway.services.registry.current
    assert (after.accounts, after.tenants) == (before.accounts, before.tenants)
    await assert_nothing_happened(gateway, valkey)


async def expect_invalid_call(gateway: RunningGateway, method: str, path: str, *fields: str, **request: Any) -> None:
    """Assert that an operator's call names these invalid fields."""
    expect_invalid(await gateway.call_admin(method, path, **request), *fields)


@pytest.mark.smoke
async def test_missing_or_invalid_token_is_401(gateway: RunningGateway) -> None:
    good, expired = gateway.token, tenants.generate_token()
    registry = (await gateway.call_admin("GET", "/registry")).json()
    token = {"sha256": tenants.hash_token(expired).hex(), "expires_at": "2020-02-02T20:20:20Z"}
    registry["tenants"]["shop"]["tokens"]["0123456789ab"] = token
    assert (await gateway.call_admin("PUT", "/registry", json=registry)).status_code == 200
    for value in (
        "Basic c2hvcDpzZWNyZXQ=",
        good,
        f"Bearer {tenants.generate_token()}",
        f"Bearer {good[:-1]}{'B' if good[-1] == 'A' else 'A'}",
        f"Bearer {good} {good}",
        f"Bearer {good[:-1]}é".encode("latin-1"),
        f"Bearer {ADMIN_TOKEN}",
        f"Bearer {expired}",
    ):
        for method, path in (("GET", "/v1/tasks?limit=0"), ("POST", UPSCALE)):
            response = await gateway.call(method, path, token="", headers={"Authorization": value})
            expect_problem(response, 401, "unauthenticated")
            challenge = response.headers["www-authenticate"]
            assert challenge == 'Bearer realm="imaging-gateway", error="invalid_token"', value
    response = await gateway.call("GET", "/v1/quota", token="")
    expect_problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == 'Bearer realm="imaging-gateway"'


async def test_unsupported_and_malformed_bodies(gateway: RunningGateway) -> None:
    unsupported: list[dict[str, Any]] = [
        {"content": b"{}", "headers": {"Content-Type": "application/problem+json"}},
        {},
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"x", "headers": {"Content-Type": ";;;=,"}},
        {"files": [("image", TEXT)]},
    ]
    for request in unsupported:
        expect_problem(await gateway.call("POST", UPSCALE, **request), 415, "unsupported-media-type")
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (b"", b"--other\r\n", b"--b", b"--b\r\nno header\r\n\r\n--b--"):
        response = await gateway.call("POST", UPSCALE, content=body, headers=form)
        expect_problem(response, 400, "malformed-request")
    many = [("image", FILE), *((f"field{number}", (None, "x")) for number in range(100))]
    for parts in (many, [("image", FILE), ("x" * 200, (None, "x"))], [("image", FILE), ("", (None, "nameless"))]):
        expect_problem(await gateway.call("POST", UPSCALE, files=parts), 400, "malformed-request")
    coded: dict[str, Any] = {"content": b"{}", "headers": {"Content-Encoding": "gzip", "Content-Type": "text/json"}}
    responses = [await gateway.submit(kind, headers={"Content-Encoding": "identity, zstd"}) for kind in Kind]
    for method, path in OPERATORS_BODIES:
        responses += [await gateway.call_admin(method, path, **coded)]
    for response in responses:
        expect_problem(response, 415, "unsupported-media-type")
        assert response.headers["accept-encoding"] == "identity"


@pytest.mark.smoke
async def test_invalid_options_and_parts_are_named(gateway: RunningGateway) -> None:
    for kind, options in FAULTY_OPTIONS.items():
        for option, values in options.items():
            for value in values:
                expect_invalid(await gateway.submit(kind, {option: value}), option)
    expect_invalid(await gateway.call("POST", f"{UPSCALE}?scale=3", files=[("image", FILE)]), "scale")
    for parts, field in FAULTY_PARTS:
        expect_invalid(await gateway.call("POST", UPSCALE, files=parts), field)
    parts = [("image", FILE), *((name, (None, "99")) for name in ("scale", "colors", "vector", "fit", "fit"))]
    parts += [("steps", (None, "30")), ("steps", (None, "30"))]
    response = await gateway.call("POST", UPSCALE, files=parts)
    expect_invalid(response, "scale", "colors", "vector", "fit", "fit", "steps")


async def test_unknown_paths_and_methods(gateway: RunningGateway) -> None:
    long_paths = ["/v1/tasks/" + "x" * 30_000, "/" + "x/" * 10_000]
    for path in ("/v1", "/v1/", "/v2/tasks", "/v1/tasks/a/b", "/api/submit", "/%00", *long_paths):
        expect_problem(await gateway.call("GET", path), 404, "not-found")
    expect_problem(await gateway.call("GET", "/v1/nowhere", token=""), 404, "not-found")
    for method, path, allowed in (
        ("GET", "/api/submit_task", {"POST", "OPTIONS"}),
        ("HEAD", UPSCALE, {"POST", "OPTIONS"}),
        ("PATCH", "/v1/quota", {"GET", "HEAD", "OPTIONS"}),
    ):
        response = await gateway.call(method, path)
        assert response.status_code == 405
        if method != "HEAD":
            expect_problem(response, 405, "method-not-allowed")
        options = await gateway.call("OPTIONS", path, token="")
        assert (options.status_code, options.content) == (204, b"")
        for answered in (response, options):
            assert set(answered.headers["allow"].split(", ")) == allowed
    many_headers = {f"X-Header-{number}": "x" * 500 for number in range(60)}
    assert (await gateway.call("GET", "/v1/quota", headers=many_headers)).status_code == 200
    expect_problem(await gateway.call("GET", "/v1/quota", token="x" * 30_000), 401, "unauthenticated")
    for method in ("POST", "OPTIONS"):
        response = await gateway.call_admin(method, "/tenants/shop")
        assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"}


async def test_invalid_query_parameters_are_named(gateway: RunningGateway) -> None:
    cases = {
        "limit": ["0", "101", "x", "", "9" * 30, "%ff", "5&limit=5"],
        "state": ["null", "queued&state=running", "", "%00"],
        "kind": ["face_enhance"],
        "cursor": ["null", "x&cursor=y"],
    }
    for parameter, values in cases.items():
        for value in values:
            expect_invalid(await gateway.call("GET", f"/v1/tasks?{parameter}={value}"), parameter)
    for cursor in ("%00", "AAAA", "x" * 30_000):
        expect_problem(await gateway.call("GET", f"/v1/tasks?cursor={cursor}"), 400, "malformed-request")
    (token,) = gateway.services.registry.current.tokens
    for query, field in (("", "tenant"), ("tenant=shop&limit=0", "limit"), ("tenant=shop&status=x", "status")):
        await expect_invalid_call(gateway, "GET", f"/tasks?{query}", field)
    for path, queries in (
        (f"/tenants/shop/tokens/{token}", {"grace": ["-1", "nan", "31536001", ""], "grase": ["60"]}),
        ("/tenants/shop", {"force": ["perhaps", ""], "grace": ["60"]}),
    ):
        for name, values in queries.items():
            for value in values:
                await expect_invalid_call(gateway, "DELETE", path, name, params={name: value})


@pytest.mark.parametrize(
    ("method", "path", "valid", "cases"),
    [
        ("PUT", "/accounts/main", {"user_key": "good"}, INVALID_ACCOUNTS),
        ("PUT", "/tenants/shop", {"accounts": ["main"]}, INVALID_TENANTS),
        ("POST", "/tenants/shop/tokens", {}, INVALID_TOKENS),
    ],
)
async def test_invalid_settings_are_named(
    gateway: RunningGateway, method: str, path: str, valid: dict[str, Any], cases: Mapping[str, Sequence[Any]]
) -> None:
    for field, values in cases.items():
        name = field.partition(".")[0].partition("[")[0]
        for value in values:
            await expect_invalid_call(gateway, method, path, field, json=valid | {name: value})
    assert len(gateway.services.registry.current.tokens) == 1


async def test_invalid_names_and_bodies_of_operators(gateway: RunningGateway) -> None:
    for name in ("A", "-a", "a b", "商店", "a%0A", "a" * 64):
        await expect_invalid_call(gateway, "PUT", f"/accounts/{name}", "name", json={"user_key": "good"})
        await expect_invalid_call(gateway, "PUT", f"/tenants/{name}", "name", json={"accounts": ["main"]})
    for user_key in ({}, {"user_key": None}):
        await expect_invalid_call(gateway, "PUT", "/accounts/new", "user_key", json=user_key)
    await expect_invalid_call(gateway, "PUT", "/tenants/new", "accounts", json={})
    both = {"accounts": ["main"], "purse": "count_only", "spending_mode": "count_only"}
    await expect_invalid_call(gateway, "PUT", "/tenants/shop", "purse", json=both)
    await expect_invalid_call(gateway, "PUT", "/registry", "tenants.shop.purse", json={"tenants": {"shop": both}})
    patches: list[tuple[str, dict[str, Any], str]] = [
        ("/accounts/main", {"max_price": {"upscale": 0.001}}, "max_price.upscale"),
        ("/tenants/shop", {"tokens": {}}, "tokens"),
        ("/tenants/shop", {"accounts": None}, "accounts"),
        ("/tenants/shop", {"webhook": {"allow": ["x"]}}, "webhook.url"),
    ]
    for path, patch, field in patches:
        await expect_invalid_call(gateway, "PATCH", path, field, json=patch)
    for path in ("/accounts/new", "/tenants/new"):
        for no_object in (b"null", b"[]", b'"x"', b""):
            await expect_invalid_call(gateway, "PUT", path, "body", content=no_object)
    deep = b"[" * 100_000 + b"]" * 100_000
    for body in (
        b"{",
        b"\xff",
        b'{"floor_money": 1e999}',
        b'{"user_key": "a", "user_key": "b"}',
        b'{"accounts": ' + deep + b"}",
        b'{"limits": [{"window": ' + deep + b"}]}",
        b'{"webhook": {"url": "https://a.example/", "url": "https://b.example/"}, "accounts": ["main"]}',
    ):
        for method, path in OPERATORS_BODIES:
            expect_problem(await gateway.call_admin(method, path, content=body), 400, "malformed-request")
    large = b'{"user_key": "' + b"x" * 1_000_000 + b'"}'
    expect_problem(await gateway.call_admin("PUT", "/accounts/main", content=large), 400, "malformed-request")


async def test_operators_bodies_that_never_arrive(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "BODY_SECONDS", 0.05)
    before = (await gateway.call_admin("GET", "/registry")).json()
    fields = f"Host: x\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\nContent-Length: 20\r\n\r\n"
    with capture_logs() as logs:
        for method, path in OPERATORS_BODIES:
            request = f"{method} /admin/v1{path} HTTP/1.1\r\n{fields}{{".encode()
            async with open_raw_connection(urlsplit(gateway.ops_url).port or 0) as (reader, writer):
                writer.write(request)
                async with asyncio.timeout(20):
                    received = await reader.read()
            assert received.startswith(b"HTTP/1.1 400 ")
            assert b"\nconnection: close\r" in received.lower()
            async with open_raw_connection(urlsplit(gateway.ops_url).port or 0) as (_, writer):
                writer.write(request)
        assert (await gateway.call_admin("GET", "/registry")).json() == before
    outcomes = {line.get("outcome") for line in logs if line["path"] != "/admin/v1/registry" or line["method"] != "GET"}
    assert outcomes == {"malformed-request", "client-disconnected"}
