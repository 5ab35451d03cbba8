"""Redaction copes with anything that is logged."""

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
OTHERS = tuple(f"{number:04}-another-secret" for number in range(20))
PLAIN_WORDS = st.text("abc xyz.,-/", max_size=8)


def encoded_secrets(secret: str) -> st.SearchStrategy[str]:
    """A secret in some spelling, within some text."""
    plain = secret.encode()
    spelling = st.sampled_from(
        [
            secret,
            repr(secret),
            json.dumps(json.dumps(secret)),
            quote(secret, safe=""),
            repr(plain),
            plain.hex(),
            *(base64.b64encode(b"#" * before + plain).decode() for before in range(3)),
            base64.urlsafe_b64encode(b"###" + plain).decode(),
        ]
    )
    return st.builds(lambda before, it, after: f"{before}<{it}>{after}", PLAIN_WORDS, spelling, PLAIN_WORDS)


def structures_with_secrets(secrets: list[str]) -> st.SearchStrategy[Any]:
    """Any structure with secrets somewhere in it: as values, names, parts of texts and of objects."""
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


@given(structures_with_secrets([*OTHERS[:3], SECRET, "p@ss w/rd&='\"\\", *TOKENS]))
def test_no_secret_is_found_again(value: Any) -> None:
    """Neither a known secret nor a token is found again, however it is spelled and wherever it stands."""
    told = ["p@ss w/rd&='\"\\", SECRET, *OTHERS]
    event = Redactor(told)(None, "info", {"event": "x", "value": value})
    written = json.dumps(event, ensure_ascii=False) + "".join(iter_texts(event))
    for secret in (*told, *TOKENS):
        plain = secret.encode()
        assert secret not in written
        assert plain.hex() not in written
        assert quote(secret, safe="") not in written
        for before in range(3):
            assert base64.b64encode(b"#" * before + plain).decode()[4:-4] not in written


@given(st.sampled_from(["prompt", "metadata", "user_key", "Authorization"]), st.text(min_size=1), st.integers(0, 3))
def test_nothing_is_told_of_what_stands_under_a_telling_name(name: str, value: str, depth: int) -> None:
    """A text under such a name is left out whatever it holds, in JSON within JSON and in representations of that."""
    value = f"{value}canary{value}canary"
    about: Any = {"a": 1, name: value, "b": 2}
    for _ in range(depth):
        about = {"inner": json.dumps(about)}
    for text in (json.dumps(about), repr(about), repr(json.dumps(about)), json.dumps(repr(about))):
        assert "canary" not in Redactor().redact_text(text)


@pytest.mark.parametrize("pair", [("prompt", "a cat"), [b"cookie", "a cat"], {"name": "user_key", "value": "a cat"}])
def test_names_beside_their_values(pair: Any) -> None:
    """A header, or a field of a form, keeps its name and loses its value."""
    event = Redactor()(None, "info", {"event": "x", "headers": [pair, ("accept", "image/*")]})
    assert "cat" not in str(event)
    assert "image/*" in str(event)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@ss@host:8/ended?key=x#y is away", "https://[redacted]@host:8/ended?[redacted] is away"),
        ("https://host/a@2x.png", "https://host/a@2x.png"),
        ("GET /ended?key=x HTTP/1.1", "GET /ended?[redacted] HTTP/1.1"),
        ("what? no=1", "what? no=1"),
        ("prompt: a cat, sitting\nnext", "prompt: [redacted]\nnext"),
        ("\x1b[31mred\r", "\\x1b[31mred\\x0d"),
    ],
)
def test_running_text(text: str, shown: str) -> None:
    """Of an address its host and path stay, of a prompt nothing, and of all else whatever is no secret."""
    assert Redactor().redact_text(text) == shown


def iter_texts(value: Any) -> list[str]:
    """Every text within an event."""
    if isinstance(value, dict):
        return [*value, *(text for each in value.values() for text in iter_texts(each))]
    if isinstance(value, list):
        return [text for each in value for text in iter_texts(each)]
    return [value] if isinstance(value, str) else []


@given(
    st.recursive(st.text() | st.floats() | st.binary() | st.integers(), lambda each: st.lists(each) | st.tuples(each))
)
def test_anything_can_be_written(value: Any) -> None:
    """No value makes logging fail, whatever characters or numbers it holds."""
    event = Redactor([SECRET])(None, "info", {"event": "x", "value": value, "odd": "\ud800"})
    assert json.loads(msgspec.json.encode(event))["event"] == "x"


@pytest.mark.parametrize("text", ["{}", "x{}x", "'{}', which"])
def test_webhook_secrets(text: str) -> None:
    """A webhook secret is not logged, wherever it stands."""
    secret = generate_secret()
    assert secret.removeprefix("whsec_") not in Redactor().redact_text(text.format(secret))


@pytest.mark.parametrize(
    "text",
    [
        *("token" * 20_000, "igw_" * 20_000, 'secret="' * 20_000, "secret=\\'" * 20_000, "://" * 20_000, "?" * 20_000),
        *("secret={'" * 20_000, 'secret={\\"' * 20_000, 'name="x"' * 20_000, "token=[(" * 20_000, "bearer " * 20_000),
        *("\\" * 50_000 + "'", "secret=" + "\\" * 50_000),
    ],
)
def test_redaction_of_long_texts_ends(text: str) -> None:
    """Texts made to be hard to search take no longer than others."""
    assert len(Redactor([SECRET]).redact_text(text)) <= 2 * len(text)
