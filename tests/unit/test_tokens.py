"""Tokens of tenants."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.domain import tenants
from service.domain.tenants import Token

TOKEN = tenants.generate_token()


def test_new_tokens_are_unique_and_valid() -> None:
    tokens = {tenants.generate_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(token.startswith("igw_") and tenants.has_valid_checksum(token) for token in tokens)


@given(st.data())
def test_typos_are_detected(data: st.DataObject) -> None:
    token = TOKEN
    place = data.draw(st.integers(4, len(token) - 1))
    letter = data.draw(st.sampled_from("aZ09-é").filter(lambda item: item != token[place]))
    assert not tenants.has_valid_checksum(token[:place] + letter + token[place + 1 :])
    assert not tenants.has_valid_checksum(token[:place] + token[place + 1 :])
    assert not tenants.has_valid_checksum(token[:place] + letter + token[place:])


@given(st.text())
def test_any_text_can_be_checked(text: str) -> None:
    assert not tenants.has_valid_checksum(text)
    assert not tenants.has_valid_checksum("igw_" + text)


def test_expiry() -> None:
    token = Token("t", 1, b"", None, created_at=0, expires_at=100)
    assert token.is_valid_at(99.9)
    assert not token.is_valid_at(100)
    assert Token("t", 1, b"", None, created_at=0).is_valid_at(1e12)
