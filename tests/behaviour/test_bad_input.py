"""Invalid requests get the right problem and cost nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.domain import tenants
from service.domain.tasks import MAX_METADATA_BYTES
from tests.behaviour.audit import UNREACHABLE_POLICIES, assert_nothing_happened, expect_problem
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway
from tests.support.images import make_png
from tests.support.valkey import Valkey

UPSCALE = "/v1/tasks/upscale"
FILE = ("picture.png", make_png(), "image/png")

FAULTY_OPTIONS = {
    "upscale": {
        "scale": ["0.99", "8.01", "-2", "nan", "inf", "-inf", "1e400", "1,5", "two", "0x2", " 2", "٢", "true"],
        "noise": ["0.999", "1.1001", "nan"],
        "steps": ["19", "41", "25.5", "1e9", "thirty", "nan", "9" * 400],
        "inpaint_strength": ["-0.01", "1.01", "nan"],
        "colors": ["1", "17", "2.5"],
        "high_fidelity": ["yes", "2", "None"],
        "strong_inpaint": ["on"],
        "vector": ["-1"],
        "prompt": ["x" * 2_001, "很" * 2_001],
        "negative_prompt": ["x" * 60_000],
        "model": ["通用", "General", "unknown-model"],
        "style": ["photo"],
        "fit": ["0.5"],
        "wait": ["5"],
        "Scale": ["2"],
        "user_key": ["other-key"],
        "": ["nameless"],
    },
    "vectorize": {"colors": ["1", "17", "-5", "nan", "5.5", "five"], "scale": ["2"], "fit": ["0.5"]},
    "face-enhance": {"scale": ["2"], "colors": ["5"], "prompt": [""]},
    "seamless": {"fit": ["0.09", "0.91", "nan", "inf", "half"], "colors": ["5"]},
}

FAULTY_METADATA = {
    "not JSON": "{",
    "an array": "[]",
    "null": "null",
    "a string": '"a"',
    "a name twice": '{"a": "b", "a": "c"}',
    "a number as value": '{"a": 1}',
    "null as value": '{"a": null}',
    "an object as value": '{"a": {"b": "c"}}',
    "half a surrogate pair": '{"a": "\\ud800"}',
    "more after its end": "{} {}",
    "too deep": "[" * 1_000,
    "too large": json.dumps({"a": "x" * MAX_METADATA_BYTES}),
    "too large in bytes": json.dumps({"a": "很" * (MAX_METADATA_BYTES // 3)}, ensure_ascii=False),
}


@pytest.fixture(autouse=True)
async def _assert_nothing_happened(gateway: RunningGateway, valkey: Valkey) -> AsyncIterator[None]:
    """Assert after each test that nothing happened."""
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    yield
    await assert_nothing_happened(gateway, valkey)


async def test_missing_or_invalid_token_is_401(gateway: RunningGateway) -> None:
    good = gateway.token
    swapped = good[:-1] + ("A" if good[-1] != "A" else "B")
    expired = tenants.generate_token()
    registry = (await gateway.call_admin("GET", "/registry")).json()
    token = {"sha256": tenants.hash_token(expired).hex(), "expires_at": "2020-02-02T20:20:20Z"}
    registry["tenants"]["shop"]["tokens"]["0123456789ab"] = token
    assert (await gateway.call_admin("PUT", "/registry", json=registry)).status_code == 200
    headers = {
        "another scheme": "Basic c2hvcDpzZWNyZXQ=",
        "no token": "Bearer",
        "the bare token": good,
        "not ours": "Bearer x",
        "another gateway's": f"Bearer {tenants.generate_token()}",
        "mistyped": f"Bearer {swapped}",
        "cut off": f"Bearer {good[:-1]}",
        "too long": f"Bearer {good}0",
        "in lower case": f"Bearer {good.lower()}",
        "two tokens": f"Bearer {good} {good}",
        "not ASCII": f"Bearer {good[:-1]}é".encode("latin-1"),
        "the operators'": f"Bearer {ADMIN_TOKEN}",
        "expired": f"Bearer {expired}",
    }
    calls = [("GET", "/v1/quota"), ("GET", "/v1/tasks?limit=0"), ("GET", "/v1/tasks/task_x"), ("POST", UPSCALE)]
    for name, value in headers.items():
        for method, path in calls:
            response = await gateway.call(method, path, token="", headers={"Authorization": value})
            expect_problem(response, 401, "unauthenticated")
            challenge = response.headers["www-authenticate"]
            assert challenge == 'Bearer realm="imaging-gateway", error="invalid_token"', name
    response = await gateway.call("GET", "/v1/quota", token="")
    expect_problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == 'Bearer realm="imaging-gateway"'


async def test_revoked_token(gateway: RunningGateway) -> None:
    made = (await gateway.call_admin("POST", "/tenants/shop/tokens", json={})).json()
    assert (await gateway.call("GET", "/v1/quota", token=made["token"])).status_code == 200
    response = await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{made['id']}")
    assert response.status_code == 204
    expect_problem(await gateway.call("GET", "/v1/quota", token=made["token"]), 401, "unauthenticated")
    expect_problem(await gateway.submit(token=made["token"]), 401, "unauthenticated")


async def test_non_form_body_is_415(gateway: RunningGateway) -> None:
    multipart = "multipart/form-data"
    cases: dict[str, dict[str, Any]] = {
        "JSON": {"json": {"image": "..."}},
        "urlencoded": {"data": {"image": "..."}},
        "the bare image": {"content": FILE[1], "headers": {"Content-Type": "image/png"}},
        "nothing": {},
        "no boundary": {"content": b"x", "headers": {"Content-Type": multipart}},
        "an empty boundary": {"content": b"x", "headers": {"Content-Type": f"{multipart}; boundary="}},
        "another multipart": {"content": b"x", "headers": {"Content-Type": "multipart/mixed; boundary=x"}},
        "nonsense": {"content": b"x", "headers": {"Content-Type": ";;;=,"}},
    }
    for name, request in cases.items():
        problem = expect_problem(await gateway.call("POST", UPSCALE, **request), 415, "unsupported-media-type")
        assert multipart in problem["detail"], name


async def test_malformed_form_is_400(gateway: RunningGateway) -> None:
    for body in (b"", b"x", b"--other\r\n", b"--b", b"--b\r\nno header\r\n\r\n--b--", b"\0" * 1_000):
        response = await gateway.call(
            "POST", UPSCALE, content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        expect_problem(response, 400, "malformed-request")


async def test_exactly_one_image_part_is_required(gateway: RunningGateway) -> None:
    text = (None, "an image in words")
    cases: dict[str, tuple[list[tuple[str, Any]], str]] = {
        "no file": ([("prompt", (None, "a cat"))], "image"),
        "two files": ([("image", FILE), ("image", FILE)], "image"),
        "a file beside it": ([("image", FILE), ("mask", FILE)], "mask"),
        "another name": ([("input_image", FILE)], "input_image"),
        "a text, then a file": ([("image", text), ("image", FILE)], "image"),
        "a file as an option": ([("image", FILE), ("prompt", ("prompt.txt", b"a cat"))], "prompt"),
    }
    for name, (parts, field) in cases.items():
        problem = expect_problem(await gateway.call("POST", UPSCALE, files=parts), 422, "invalid-options")
        assert [error["field"] for error in problem["errors"]] == [field], name


async def test_undecodable_field_is_422(gateway: RunningGateway) -> None:
    for value, media_type in (
        (b"\xff", None),
        (b"x", "text/plain; charset=nonsense"),
        (b"x\xff", "text/x; charset=gbk"),
    ):
        prompt = (None, value, media_type) if media_type else (None, value)
        parts: list[tuple[str, Any]] = [("image", FILE), ("prompt", prompt)]
        problem = expect_problem(await gateway.call("POST", UPSCALE, files=parts), 422, "invalid-options")
        assert [error["field"] for error in problem["errors"]] == ["prompt"]
    response = await gateway.call("POST", UPSCALE, files=[("image", (None, "an image in words"))])
    expect_problem(response, 415, "unsupported-media-type")


async def test_content_encoding_is_415(gateway: RunningGateway) -> None:
    for coding in ("gzip", "br", "deflate", "identity, zstd", "aws-chunked"):
        headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
        for response in (
            *[await gateway.submit(kind, headers={"Content-Encoding": coding}) for kind in FAULTY_OPTIONS],
            await gateway.call_admin("PUT", "/accounts/main", content=b"{}", headers=headers),
            await gateway.call_admin("PUT", "/tenants/shop", content=b"{}", headers=headers),
            await gateway.call_admin("POST", "/tenants/shop/tokens", content=b"{}", headers=headers),
            await gateway.call_admin("PUT", "/registry", content=b"{}", headers=headers),
            await gateway.call_admin("POST", "/refunds", content=b"{}", headers=headers),
        ):
            expect_problem(response, 415, "unsupported-media-type")
            assert response.headers["accept-encoding"] == "identity"


async def test_invalid_option_is_422(gateway: RunningGateway) -> None:
    for kind, options in FAULTY_OPTIONS.items():
        for option, values in options.items():
            for value in values:
                if not option:
                    expect_problem(await gateway.submit(kind, {option: value}), 400, "malformed-request")
                    continue
                problem = expect_problem(await gateway.submit(kind, {option: value}), 422, "invalid-options")
                (error,) = problem["errors"]
                assert error["field"] == option, (kind, option, value)
                assert error["detail"].startswith(("must be ", "is not an option; ")), error
                assert "nan" not in error["detail"], error


async def test_all_invalid_fields_are_listed(gateway: RunningGateway) -> None:
    parts = [("image", FILE), *((name, (None, "99")) for name in ("scale", "colors", "vector", "fit", "fit"))]
    parts += [("steps", (None, "30")), ("steps", (None, "30"))]
    problem = expect_problem(await gateway.call("POST", UPSCALE, files=parts), 422, "invalid-options")
    details = [(error["field"], error["detail"]) for error in problem["errors"]]
    assert [field for field, _ in details] == ["scale", "colors", "vector", "fit", "fit", "steps"]
    assert details[0][1] == "must be a number from 1 to 8"
    assert details[1][1] == "must be a whole number from 2 to 16"
    assert details[2][1] == "must be true or false"
    assert details[5][1] == "is given more than once"


async def test_invalid_metadata_is_422(gateway: RunningGateway) -> None:
    for name, value in FAULTY_METADATA.items():
        problem = expect_problem(await gateway.submit("face-enhance", {"metadata": value}), 422, "invalid-options")
        assert [error["field"] for error in problem["errors"]] == ["metadata"], name
    parts = [("image", FILE), ("metadata", (None, "{}")), ("metadata", (None, "{}"))]
    problem = expect_problem(await gateway.call("POST", UPSCALE, files=parts), 422, "invalid-options")
    assert problem["errors"] == [{"field": "metadata", "detail": "is given more than once"}]


async def test_excessive_form_fields_are_refused(gateway: RunningGateway) -> None:
    many = [("image", FILE), *((f"field{number}", (None, "x")) for number in range(100))]
    expect_problem(await gateway.call("POST", UPSCALE, files=many), 400, "malformed-request")
    expect_problem(
        await gateway.call("POST", UPSCALE, files=[("image", FILE), ("x" * 200, (None, "x"))]), 400, "malformed-request"
    )
    problem = expect_problem(await gateway.submit("upscale", {"prompt": "x" * 100_000}), 422, "invalid-options")
    assert problem["errors"][0]["field"] == "prompt"


async def test_unknown_path_is_404_and_method_405(gateway: RunningGateway) -> None:
    for path in (
        "/v1",
        "/v1/",
        "/v2/tasks",
        "/v1/tasks/a/b",
        "/api/submit",
        "/admin/v1/tenants",
        "/metrics",
        "/%00",
    ):
        expect_problem(await gateway.call("GET", path), 404, "not-found")
        expect_problem(await gateway.call("GET", path, token=""), 404, "not-found")
    for method, path, allowed in (
        ("GET", "/api/submit_task", {"POST", "OPTIONS"}),
        ("HEAD", UPSCALE, {"POST", "OPTIONS"}),
        ("DELETE", UPSCALE, {"POST", "OPTIONS"}),
        ("PUT", "/v1/tasks", {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/v1/quota", {"GET", "HEAD", "OPTIONS"}),
        ("PATCH", "/v1/quota", {"GET", "HEAD", "OPTIONS"}),
    ):
        response = await gateway.call(method, path)
        assert response.status_code == 405
        if method != "HEAD":
            expect_problem(response, 405, "method-not-allowed")
        assert set(response.headers["allow"].split(", ")) == allowed
        options = await gateway.call("OPTIONS", path, token="")
        assert (options.status_code, options.content) == (204, b"")
        assert set(options.headers["allow"].split(", ")) == allowed


async def test_invalid_query_parameter_is_named(gateway: RunningGateway) -> None:
    cases = {
        "limit": ["0", "101", "-1", "x", "", "1.5", "nan", "9" * 30, "%ff", "null", "5&limit=5"],
        "state": ["ended", "null", "queued&state=running", "Queued", "", "queued,running", "%00"],
        "kind": ["face_enhance", "", "1", "null"],
        "cursor": ["null", "x&cursor=y"],
    }
    for parameter, values in cases.items():
        for value in values:
            response = await gateway.call("GET", f"/v1/tasks?{parameter}={value}")
            problem = expect_problem(response, 422, "invalid-options")
            assert [error["field"] for error in problem["errors"]] == [parameter], value
            assert problem["errors"][0]["detail"].startswith(("must ", "is ")), problem
            assert "`" not in problem["detail"], problem
    for cursor in ("x", "%00", "AAAA", "x" * 30_000, "%F0%9F%99%82"):
        expect_problem(await gateway.call("GET", f"/v1/tasks?cursor={cursor}"), 400, "malformed-request")


async def test_oversized_path_and_headers(gateway: RunningGateway) -> None:
    expect_problem(await gateway.call("GET", "/v1/tasks/" + "x" * 30_000), 404, "not-found")
    expect_problem(await gateway.call("GET", "/" + "x/" * 10_000), 404, "not-found")
    many = {f"X-Header-{number}": "x" * 500 for number in range(60)}
    assert (await gateway.call("GET", "/v1/quota", headers=many)).status_code == 200
    expect_problem(await gateway.call("GET", "/v1/quota", token="x" * 30_000), 401, "unauthenticated")
