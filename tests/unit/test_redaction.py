"""Redaction copes with anything that is logged."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.webhook import new_secret
from service.telemetry.redaction import Redactor

SECRET = "hunter2-hunter2"


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
    secret = new_secret()
    assert secret.removeprefix("whsec_") not in Redactor().text(text.format(secret))


@pytest.mark.parametrize(
    "text", ["token" * 20_000, "igw_" * 20_000, 'secret="' * 20_000, "secret=\\'" * 20_000, "://" * 20_000]
)
def test_redaction_of_long_texts_ends(text: str) -> None:
    """Texts made to be hard to search take no longer than others."""
    assert len(Redactor([SECRET]).text(text)) <= 2 * len(text)
