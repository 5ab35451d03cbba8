"""Validation in the operators' API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from service.domain.tenants import NAME_RULE
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway

INVALID_NAMES = ["A", "-a", ".a", "a b", "商店", "a%0A", "%0Aa", "a%00", "a" * 64]

INVALID_ACCOUNTS: Mapping[str, Sequence[Any]] = {
    "user_key": ["", " ", "a b", "a\n", "钥匙", "x" * 513, 5, ["x"]],
    "base_url": [
        "",
        "upstream.example",
        "ftp://host",
        "//host",
        "http://",
        "http://:80",
        "http://host:99999",
        "http://host:port",
        "http://[::1",
        "http://user:password@host",
        "http://host/?",
        "http://host/?query=1",
        "http://host/#part",
        "http://host/\n",
        "http://ho st",
        "http://bücher.example",
        "http://host/" + "x" * 501,
        5,
    ],
    "floor_count": [-1, 1.5, 10**13, 10**40, "many", "nan", None, True, [], {}],
    "floor_money": [-0.01, 0.001, 10**11, 1e308, "1e999999", "nan", "sNaN", "inf", "much", None, True, []],
    "max_price": [None, 5, []],
    "max_price.nonsense": [{"nonsense": 1}],
    "max_price.upscale": [{"upscale": value} for value in (0.005, -1, None, "nan")],
    "nonsense": [1],
    "User_key": ["x"],
}

INVALID_TENANTS: Mapping[str, Sequence[Any]] = {
    "accounts": [None, "main", ["unknown"], ["main", "main"], ["main"] * 101],
    "accounts[0]": [["Main"], ["main\n"], [5], [None]],
    "limits": [5, {"window": "day"}, [{"window": "day", "tasks": 1}, {"window": "day", "money": 1}]],
    "limits[0]": [[{"window": "day"}], [{"window": "day", "tasks": None}], [5]],
    "limits[0].window": [[{"tasks": 1}], [{"window": "week", "tasks": 1}], [{"window": None, "tasks": 1}]],
    "limits[0].tasks": [[{"window": "day", "tasks": item}] for item in (-1, 0.5, 10**13, True, "few")],
    "limits[0].money": [[{"window": "day", "money": value}] for value in (-1, 0.005, 1e11, True, "sNaN")],
    "limits[0].nonsense": [[{"window": "day", "tasks": 1, "nonsense": 1}]],
    "max_active": [-1, 0.5, 10**13, "many", True],
    "spending_mode": ["all", "", None, 5],
    "kinds": [5, "upscale", ["upscale", "upscale"]],
    "kinds[0]": [["nonsense"], [None]],
    "disabled": [None, "perhaps", []],
    "state": [None, "off", True],
    "nonsense": [1],
}

INVALID_TOKENS: Mapping[str, Sequence[Any]] = {
    "label": ["x" * 201, 5],
    "expires_at": [
        "soon",
        "2030-01-01",
        "2030-01-01T00:00:00",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
        "2030-13-01T00:00:00Z",
        "2020-01-01T00:00:00Z",
        True,
    ],
    "nonsense": [1],
}


async def read_state(gateway: RunningGateway) -> list[Any]:
    """Return everything that operators see, and the registry version."""
    content = [(await gateway.call_admin("GET", path)).json() for path in ("/accounts", "/tenants")]
    return [*content, gateway.services.registry.current.version]


def assert_own_wording(document: Mapping[str, Any]) -> None:
    """Assert that a message is the gateway's own, not the library's."""
    for error in document["errors"]:
        assert error["detail"].startswith(("must ", "is ", "as a name must ", "there is no ")), error
        assert "`" not in error["detail"], error


async def assert_field_error(gateway: RunningGateway, method: str, path: str, field: str, body: object) -> str:
    response = await gateway.call_admin(method, path, json=body)
    document = expect_problem(response, 422, "invalid-options")
    assert [error["field"] for error in document["errors"]] == [field], (body, document)
    assert_own_wording(document)
    return str(document["detail"])


@pytest.mark.parametrize("field", INVALID_ACCOUNTS)
async def test_invalid_account(gateway: RunningGateway, field: str) -> None:
    before = await read_state(gateway)
    for value in INVALID_ACCOUNTS[field]:
        body = {"user_key": "good", field.partition(".")[0].partition("[")[0]: value}
        await assert_field_error(gateway, "PUT", "/accounts/main", field, body)
    assert await read_state(gateway) == before


@pytest.mark.parametrize("field", INVALID_TENANTS)
async def test_invalid_tenant(gateway: RunningGateway, field: str) -> None:
    before = await read_state(gateway)
    for value in INVALID_TENANTS[field]:
        await assert_field_error(
            gateway, "PUT", "/tenants/shop", field, {"accounts": ["main"]} | {field.partition("[")[0]: value}
        )
    assert await read_state(gateway) == before


@pytest.mark.parametrize("field", INVALID_TOKENS)
async def test_invalid_token(gateway: RunningGateway, field: str) -> None:
    before = await read_state(gateway)
    for value in INVALID_TOKENS[field]:
        await assert_field_error(gateway, "POST", "/tenants/shop/tokens", field, {field: value})
    assert await read_state(gateway) == before


async def test_former_name_of_the_spending_mode(gateway: RunningGateway) -> None:
    tenant = {"accounts": ["main"], "purse": "count_only"}
    response = await gateway.call_admin("PUT", "/tenants/shop", json=tenant)
    assert (response.status_code, response.json()["spending_mode"]) == (200, "count_only")
    both = tenant | {"spending_mode": "count_only"}
    await assert_field_error(gateway, "PUT", "/tenants/shop", "purse", both)
    path = "tenants.shop.purse"
    await assert_field_error(gateway, "PUT", "/registry", path, {"tenants": {"shop": both}})
    response = await gateway.call_admin("PUT", "/registry", json={"tenants": {"shop": tenant}})
    assert response.status_code == 200
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["spending_mode"] == "count_only"


async def test_invalid_name(gateway: RunningGateway) -> None:
    before = await read_state(gateway)
    for name in INVALID_NAMES:
        for path, body in ((f"/accounts/{name}", {"user_key": "good"}), (f"/tenants/{name}", {"accounts": ["main"]})):
            assert await assert_field_error(gateway, "PUT", path, "name", body) == f"name: must {NAME_RULE}"
    assert await read_state(gateway) == before
    for name in ("0", "a.b-c_d", "a" * 63):
        await gateway.put_tenant(name)


async def test_required_fields(gateway: RunningGateway) -> None:
    await assert_field_error(gateway, "PUT", "/accounts/new", "user_key", {})
    await assert_field_error(gateway, "PUT", "/accounts/new", "user_key", {"user_key": None})
    await assert_field_error(gateway, "PUT", "/tenants/new", "accounts", {})
    nothing: list[Any] = [None, [], "x", 5]
    for path in ("/accounts/new", "/tenants/new"):
        for body in nothing:
            await assert_field_error(gateway, "PUT", path, "body", body)
        document = expect_problem(await gateway.call_admin("PUT", path), 422, "invalid-options")
        assert document["errors"] == [{"field": "body", "detail": "is required"}]


async def test_not_json(gateway: RunningGateway) -> None:
    for body in (b"{", b"{} {}", b"user_key=x", b"\xff", b'{"floor_money": NaN}', b'{"floor_money": 1e999}'):
        for method, path in (("PUT", "/accounts/main"), ("PUT", "/tenants/shop"), ("POST", "/tenants/shop/tokens")):
            expect_problem(await gateway.call_admin(method, path, content=body), 400, "malformed-request")
    again = b'{"accounts": ["main"], "accounts": ["other"]}'
    deep = b'{"accounts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    deeper = b'{"limits": [{"window": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}]}"
    nested = b'{"webhook": {"url": "https://a.example/", "url": "https://b.example/"}, "accounts": ["main"]}'
    for body in (again, deep, deeper, nested, b'{"user_key": "a", "user_key": "b"}'):
        for path in ("/accounts/main", "/tenants/shop", "/registry"):
            expect_problem(await gateway.call_admin("PUT", path, content=body), 400, "malformed-request")
        for path in ("/tenants/shop/tokens", "/refunds"):
            expect_problem(await gateway.call_admin("POST", path, content=body), 400, "malformed-request")
    large = b'{"user_key": "' + b"x" * 1_000_000 + b'"}'
    expect_problem(await gateway.call_admin("PUT", "/accounts/main", content=large), 400, "malformed-request")


async def test_invalid_query(gateway: RunningGateway) -> None:
    before = await read_state(gateway)
    (token,) = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]
    queries = {
        f"/tenants/shop/tokens/{token['id']}": {
            "grace": ["-1", "nan", "inf", "31536001", "long", ""],
            "grase": ["60"],
            "force": ["true"],
        },
        "/tenants/shop": {"force": ["perhaps", "", "2"], "Force": ["true"], "grace": ["60"]},
        "/accounts/main": {"force": ["perhaps"], "forced": ["true"]},
    }
    for path, fields in queries.items():
        for field, values in fields.items():
            for value in values:
                document = expect_problem(
                    await gateway.call_admin("DELETE", f"{path}?{field}={value}"), 422, "invalid-options"
                )
                assert [error["field"] for error in document["errors"]] == [field]
                assert_own_wording(document)
    assert await read_state(gateway) == before
