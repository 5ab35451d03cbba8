"""Redaction of log values."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.tenants import generate_token
from service.domain.webhooks import generate_secret
from service.telemetry.redaction import Redactor

SECRET = "hunter2-hunter2"
ODD_SECRET = "p@ss w/rd&='\"\\é\n???>>>"
OTHERS = tuple(f"{number:04}-another-secret" for number in range(20))
PLAIN_WORDS = st.text("abc xyz.,-/", max_size=8)


def list_encodings(secret: str) -> list[str]:
    """Return encodings of a secret; all but four characters at each end must disappear."""
    plain = secret.encode()
    return [
        *(secret, repr(secret), ascii(secret), json.dumps(json.dumps(secret)), quote(secret, safe="")),
        *(repr(plain), plain.hex(), base64.urlsafe_b64encode(b"###" + plain).decode()),
        *(base64.b64encode(b"#" * before + plain).decode() for before in range(3)),
    ]


def encoded_secrets(secret: str) -> st.SearchStrategy[str]:
    """Generate a secret in some encoding within some text."""
    spelling = st.sampled_from(list_encodings(secret))
    return st.builds(lambda before, it, after: f"{before}<{it}>{after}", PLAIN_WORDS, spelling, PLAIN_WORDS)


def structures_with_secrets(secrets: list[str]) -> st.SearchStrategy[Any]:
    """Generate structures that contain secrets."""
    leaf: st.SearchStrategy[Any] = (
        PLAIN_WORDS | st.integers() | st.none() | st.sampled_from(secrets).flatmap(encoded_secrets)
    )
    leaf |= st.sampled_from(secrets).flatmap(encoded_secrets).map(ValueError)
    return st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from(secrets).flatmap(encoded_secrets) | PLAIN_WORDS, inner, max_size=3)
            | st.lists(inner, max_size=3).map(repr)
            | st.dictionaries(PLAIN_WORDS, inner.map(str), max_size=3).map(json.dumps)
        ),
        max_leaves=8,
    )


TOKENS = [generate_token(), generate_token()]


@given(structures_with_secrets([*OTHERS[:3], SECRET, ODD_SECRET, *TOKENS]))
def test_secrets_are_redacted_in_every_encoding(value: Any) -> None:
    secrets = [ODD_SECRET, SECRET, *OTHERS]
    event = Redactor(secrets)(None, "info", {"event": "x", "value": value})
    written = json.dumps(event, ensure_ascii=False) + "".join(iter_texts(event))
    for secret in (*secrets, *TOKENS):
        assert [item for item in list_encodings(secret) if item[4:-4] in written] == []


@pytest.mark.parametrize("secret", [SECRET, ODD_SECRET])
def test_each_encoding_is_redacted(secret: str) -> None:
    for item in list_encodings(secret):
        assert item[4:-4] not in Redactor([secret]).redact_text(f"ab {item} cd")


@given(st.sampled_from(["prompt", "metadata", "user_key", "Authorization"]), st.text(min_size=1), st.integers(0, 3))
def test_values_under_secret_names_are_redacted(name: str, value: str, depth: int) -> None:
    value = f"{value}canary{value}canary"
    about: Any = {"a": 1, name: value, "b": 2}
    for _ in range(depth):
        about = {"inner": json.dumps(about)}
    for text in (json.dumps(about), repr(about), repr(json.dumps(about)), json.dumps(repr(about))):
        assert "canary" not in Redactor().redact_text(text)


@pytest.mark.parametrize("pair", [("prompt", "a cat"), [b"cookie", "a cat"], {"name": "user_key", "value": "a cat"}])
def test_header_and_form_names_are_kept(pair: Any) -> None:
    event = Redactor()(None, "info", {"event": "x", "headers": [pair, ("accept", "image/*")]})
    assert "cat" not in str(event)
    assert "image/*" in str(event)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://u:p@ss@host:8/ended?key=x#y is away", "https://[redacted]@host:8/ended?[redacted] is away"),
        ("https://host/a@2x.png", "https://host/a@2x.png"),
        ("GET /ended?key=x HTTP/1.1", "GET /ended?[redacted] HTTP/1.1"),
        ("what? no=1", "what? no=1"),
        ("prompt: a cat, sitting\nnext", "prompt: [redacted]\nnext"),
        ("\x1b[31mred\r", "\\x1b[31mred\\x0d"),
    ],
)
def test_urls_and_prompts_in_text(text: str, expected: str) -> None:
    assert Redactor().redact_text(text) == expected


def iter_texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in iter_texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in iter_texts(item)]
    return [value] if isinstance(value, str) else []


@given(
    st.recursive(st.text() | st.floats() | st.binary() | st.integers(), lambda item: st.lists(item) | st.tuples(item))
)
def test_any_value_can_be_logged(value: Any) -> None:
    event = Redactor([SECRET])(None, "info", {"event": "x", "value": value, "odd": "\ud800"})
    assert json.loads(msgspec.json.encode(event))["event"] == "x"


@pytest.mark.parametrize("text", ["{}", "x{}x", "'{}', which"])
def test_webhook_secrets(text: str) -> None:
    secret = generate_secret()
    assert secret.removeprefix("whsec_") not in Redactor().redact_text(text.format(secret))


@pytest.mark.parametrize(
    "text",
    [
        *("token" * 20_000, "igw_" * 20_000, 'secret"' * 20_000, "://" * 20_000, "?" * 20_000, "bearer " * 20_000),
        *("token" + "\\" * 50_000, "token" + " " * 50_000),
    ],
)
def test_redaction_of_hostile_texts_is_fast(text: str) -> None:
    assert len(Redactor([SECRET]).redact_text(text)) <= 2 * len(text)
