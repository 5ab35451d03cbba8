"""Encrypted task ids."""

from __future__ import annotations

import base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.crypto import TASK_ID_PREFIX, Keyring, TaskIdCodec
from service.domain.errors import NotFound
from service.domain.tasks import Kind, TaskReference

OLD, NEW = b"o" * 32, b"n" * 32
IDS = TaskIdCodec(Keyring([NEW]).derive("task-id"))
REFERENCE = TaskReference(7, 3, Kind.SEAMLESS, 1_750_000_000_000, "r-1", "abc-123")
ID = IDS.encode(REFERENCE)

references = st.builds(
    TaskReference,
    tenant=st.integers(0, 2**53),
    account=st.integers(0, 2**53),
    kind=st.sampled_from(Kind),
    created_at=st.integers(0, 2**53),
    reservation=st.text(max_size=40, alphabet=st.characters(exclude_categories=["Cs"])),
    upstream_id=st.text(max_size=256, alphabet=st.characters(exclude_categories=["Cs"])),
)


def is_rejected(task_id: str) -> None:
    with pytest.raises(NotFound):
        IDS.decode(task_id)


@given(references)
def test_round_trip(reference: TaskReference) -> None:
    task_id = IDS.encode(reference)
    assert IDS.decode(task_id) == reference
    assert IDS.encode(reference) == task_id
    assert task_id.startswith(TASK_ID_PREFIX)
    assert task_id.replace("-", "").replace("_", "").isalnum()


@given(references, references)
def test_distinct_ids(one: TaskReference, other: TaskReference) -> None:
    assert (IDS.encode(one) == IDS.encode(other)) == (one == other)


@given(references, st.data())
def test_one_character_changed(reference: TaskReference, data: st.DataObject) -> None:
    task_id = IDS.encode(reference)
    place = data.draw(st.integers(0, len(task_id) - 1))
    other = data.draw(st.characters().filter(lambda character: character != task_id[place]))
    is_rejected(task_id[:place] + other + task_id[place + 1 :])


@pytest.mark.parametrize("place", range(len(TASK_ID_PREFIX), len(ID)))
def test_every_position_is_significant(place: int) -> None:
    """Even where the alphabet has unused bits."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for character in alphabet.replace(ID[place], ""):
        is_rejected(ID[:place] + character + ID[place + 1 :])


@given(references, st.data())
def test_truncated(reference: TaskReference, data: st.DataObject) -> None:
    task_id = IDS.encode(reference)
    cut = data.draw(st.integers(1, len(task_id)))
    is_rejected(task_id[cut:])
    is_rejected(task_id[:-cut])


@given(references, st.text(min_size=1, max_size=8))
@example(REFERENCE, "=")
@example(REFERENCE, "==")
@example(REFERENCE, "\n")
@example(REFERENCE, "A")
@example(REFERENCE, TASK_ID_PREFIX)
def test_extended(reference: TaskReference, more: str) -> None:
    task_id = IDS.encode(reference)
    middle = len(task_id) // 2
    is_rejected(task_id + more)
    is_rejected(more + task_id)
    is_rejected(task_id[:middle] + more + task_id[middle:])


@given(references)
def test_other_encodings_of_the_same_bytes(reference: TaskReference) -> None:
    task_id = IDS.encode(reference)
    body = task_id.removeprefix(TASK_ID_PREFIX)
    standard = body.replace("-", "+").replace("_", "/")
    encrypted = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    for spelling in (standard, encrypted.hex(), base64.b32encode(encrypted).decode(), body.swapcase()):
        if spelling != body:
            is_rejected(TASK_ID_PREFIX + spelling)
    is_rejected(body)
    is_rejected(TASK_ID_PREFIX.upper() + body)


@given(st.text())
@example("")
@example(TASK_ID_PREFIX)
@example(TASK_ID_PREFIX + "\ud800")
@example(TASK_ID_PREFIX + "A" * 100_000)
def test_any_other_text(text: str) -> None:
    is_rejected(text)
    is_rejected(TASK_ID_PREFIX + text)


@given(st.binary(max_size=200))
def test_other_encrypted_content(plain: bytes) -> None:
    encrypted = Keyring([NEW]).derive("task-id").encrypt(plain)
    is_rejected(TASK_ID_PREFIX + base64.urlsafe_b64encode(encrypted).rstrip(b"=").decode())


@given(references)
def test_key_rotation(reference: TaskReference) -> None:
    old = TaskIdCodec(Keyring([OLD]).derive("task-id")).encode(reference)
    assert TaskIdCodec(Keyring([NEW, OLD]).derive("task-id")).decode(old) == reference
    is_rejected(old)


@given(references)
def test_other_purpose(reference: TaskReference) -> None:
    is_rejected(TaskIdCodec(Keyring([NEW]).derive("user-key")).encode(reference))
