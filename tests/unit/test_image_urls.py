"""Rules of `image_url`, images within it, and JSON bodies that hold one."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.api.form_parser import MAX_FORM_BYTES, MAX_JSON_BYTES, JsonForm
from service.domain.errors import GatewayError, ImageTooLarge, InvalidOptions, MalformedRequest
from service.domain.image_urls import (
    MAX_IMAGE_URL_CHARS,
    check_image_url,
    decode_data_url,
    is_data_url,
    parse_image_url,
)
from service.domain.tenants import Tenant

ALLOWED = ("images.test", "images.test:8443", "10.1.0.0/16", "8.8.8.8", "fd00::/8:9")
TENANT = Tenant(1, "shop", (), allow_image_url=ALLOWED)


def may_name(tenant: Tenant, text: str) -> bool:
    try:
        check_image_url(tenant, parse_image_url(text))
    except InvalidOptions:
        return False
    return True


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://images.test/a.png?signature=x%2Fy", True),
        ("http://IMAGES.test", True),
        ("https://images.test:8443/a", True),
        ("https://images.test:8444/a", False),
        ("http://images.test:22/", False),
        ("https://images.test.evil.test/", False),
        ("https://evil.test/images.test", False),
        ("https://sub.images.test/", False),
        ("http://10.1.2.3/", True),
        ("http://0x0a010203/", True),
        ("http://10.2.2.3/", False),
        ("http://[fd00::1]:9/", True),
        ("http://[fd00::1]/", False),
        ("http://8.8.8.8/", True),
        ("http://127.0.0.1/", False),
    ],
)
def test_hosts_and_ports_are_those_of_the_list(url: str, expected: bool) -> None:
    assert may_name(TENANT, url) is expected
    assert not may_name(Tenant(1, "shop", ()), url)


@pytest.mark.parametrize(
    "url",
    [
        *("", "images.test", "//images.test/", "ftp://images.test/", "file:///etc/passwd", "gopher://images.test/"),
        *("http://user@images.test/", "http://images.test@evil.test/", "http://evil.test#@images.test/"),
        *("http://images.test\\@evil.test/", "http://images.test/\r\nHost: evil.test", "http://images.test/ a"),
        *("http://images.test./", "http://images.test%2eevil.test/", "http://ímages.test/", "http://images。test/"),
        *("http://[fe80::1%25eth0]/", "http://[::1", "http://images.test:99999/", "http://images.test:x/"),
        *(
            "http://169.254.169.254/latest",
            "http://[::ffff:169.254.169.254]/",
            "http://0xa9fea9fe/",
            "http://images.test/#a",
        ),
        "https://images.test/" + "a" * MAX_IMAGE_URL_CHARS,
    ],
)
def test_urls_that_are_not_plain_or_lead_to_metadata_are_refused(url: str) -> None:
    everywhere = Tenant(1, "shop", (), allow_image_url=(*ALLOWED, "evil.test", "0.0.0.0/0", "::/0"))
    assert not may_name(everywhere, url)


@given(st.binary(max_size=2_000), st.sampled_from(["data:;base64,", "DATA:image/png;base64,", "data:a/b;c=d;BASE64,"]))
@example(bytes(range(256)) * 4_000, "data:;base64,")  # more than a slice
def test_content_of_a_data_url(content: bytes, head: str) -> None:
    url = head + base64.b64encode(content).decode()
    assert is_data_url(url)
    assert b"".join(decode_data_url(url)) == content


GOOD = base64.b64encode(bytes(range(256)) * 1_024).decode()


@pytest.mark.parametrize(
    "url",
    [
        *(
            "data:",
            "data:image/png,abcd",
            "data:image/png;base64",
            "data:image/png;base64;a=b,AAAA",
            "data: ;base64,AAAA",
        ),
        *("data:;base64,AAA", "data:;base64,AAA=AAAA", "data:;base64,AA-_", "data:;base64,AAAA\n", "data:;base64,é"),
        *(
            "data:;base64,=",
            f"data:;base64,{GOOD[:-4]}{GOOD}A",
            f"data:;base64,{GOOD}==",
            "data:" + "a" * 300 + ";base64,",
        ),
        f"data:;base64,{GOOD[: 256 * 1_024 - 1]}={GOOD}",
    ],
)
def test_damaged_data_urls(url: str) -> None:
    with pytest.raises(InvalidOptions) as caught:
        list(decode_data_url(url))
    assert [error.field for error in caught.value.errors] == ["image_url"]


def parse_json(body: bytes, cut: int = 7) -> list[tuple[str, Any]]:
    form = JsonForm()
    form.feed(body[:cut])
    form.feed(body[cut:])
    form.finish()
    return form.fields


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@given(st.dictionaries(st.text(max_size=20), VALUES, max_size=5), st.integers(0, 3), st.booleans())
def test_json_is_read_as_it_is_however_long_the_url(fields: dict[str, Any], size: int, is_escaped: bool) -> None:
    fields |= {"image_url": "data:image/png;base64," + "A/" * (size * MAX_FORM_BYTES // 2)}
    text = json.dumps(fields)
    body = text.replace("/", "\\/") if is_escaped else text  # as PHP writes it
    assert dict(parse_json(body.encode())) == fields


LONG = "A" * (2 * MAX_FORM_BYTES)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", MalformedRequest),
        *(
            (body, MalformedRequest)
            for body in (b"null", b"[]", b'"a"', b"{", b"{}{}", b'{"a": NaN}', b'{"a": "\xff"}')
        ),
        (b'{"a": 1, "a": 2}', MalformedRequest),
        (b'{"a": {"b": 1, "b": 2}}', MalformedRequest),
        (b'{"a": "\\ud800"}', MalformedRequest),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, MalformedRequest),
        (b'{"a": [' + b"{}," * MAX_FORM_BYTES + b"{}]}", MalformedRequest),  # would take many times its memory
        (b'{"image_url": [' + b"{}," * MAX_FORM_BYTES + b"{}]}", MalformedRequest),
        (f'{{"image_url": "{LONG}", "a": "{LONG}"}}'.encode(), MalformedRequest),
        (f'{{"image_url": "{LONG}", "image_url": "{LONG}"}}'.encode(), MalformedRequest),
        (f'{{"image_url": "a", "image_url": "{LONG}"}}'.encode(), MalformedRequest),
        (f'{{"image_url": "{LONG}", "a": 1, "a": 2}}'.encode(), MalformedRequest),
        (b'{"image_url": "' + b"A" * MAX_JSON_BYTES, ImageTooLarge),
    ],
)
def test_malformed_json(body: bytes, error: type[GatewayError]) -> None:
    with pytest.raises(error):
        parse_json(body)
