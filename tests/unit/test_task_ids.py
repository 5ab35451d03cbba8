"""Task ids: sealed references that nobody can read, alter or make."""

from __future__ import annotations

import base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.crypto import Keyring
from service.domain.errors import NotFound
from service.domain.tasks import TASK_ID_PREFIX, Kind, TaskIdCodec, TaskReference

OLD, NEW = b"o" * 32, b"n" * 32
IDS = TaskIdCodec(Keyring([NEW]).derive("task-id"))
REFERENCE = TaskReference(7, 3, Kind.SEAMLESS, 1_750_000_000_000, "r-1", "abc-123")
ID = IDS.encode(REFERENCE)

references = st.builds(
    TaskReference,
    tenant=st.integers(0, 2**53),
    account=st.integers(0, 2**53),
    kind=st.sampled_from(Kind),
    created=st.integers(0, 2**53),
    reservation=st.text(max_size=40, alphabet=st.characters(exclude_categories=["Cs"])),
    upstream_id=st.text(max_size=256, alphabet=st.characters(exclude_categories=["Cs"])),
)


def is_rejected(task_id: str) -> None:
    with pytest.raises(NotFound):
        IDS.decode(task_id)


@given(references)
def test_round_trip(reference: TaskReference) -> None:
    """An id stands for the reference it was made of, always the same one, and can stand in a URL."""
    task_id = IDS.encode(reference)
    assert IDS.decode(task_id) == reference
    assert IDS.encode(reference) == task_id
    assert task_id.startswith(TASK_ID_PREFIX)
    assert task_id.replace("-", "").replace("_", "").isalnum()


@given(references, references)
def test_distinct(one: TaskReference, other: TaskReference) -> None:
    """Different references have different ids."""
    assert (IDS.encode(one) == IDS.encode(other)) == (one == other)


@given(references, st.data())
def test_one_character_changed(reference: TaskReference, data: st.DataObject) -> None:
    """An id with any one character changed is not found."""
    task_id = IDS.encode(reference)
    place = data.draw(st.integers(0, len(task_id) - 1))
    other = data.draw(st.characters().filter(lambda character: character != task_id[place]))
    is_rejected(task_id[:place] + other + task_id[place + 1 :])


@pytest.mark.parametrize("place", range(len(TASK_ID_PREFIX), len(ID)))
def test_every_place(place: int) -> None:
    """No place of an id takes another character of its alphabet, not even where that has unused bits."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for character in alphabet.replace(ID[place], ""):
        is_rejected(ID[:place] + character + ID[place + 1 :])


@given(references, st.data())
def test_truncated(reference: TaskReference, data: st.DataObject) -> None:
    """An id that was cut at either end is not found."""
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
    """An id with anything before, behind or within it is not found, padding and blanks included."""
    task_id = IDS.encode(reference)
    middle = len(task_id) // 2
    is_rejected(task_id + more)
    is_rejected(more + task_id)
    is_rejected(task_id[:middle] + more + task_id[middle:])


@given(references)
def test_respelled(reference: TaskReference) -> None:
    """The same bytes in another spelling are not found."""
    task_id = IDS.encode(reference)
    body = task_id.removeprefix(TASK_ID_PREFIX)
    standard = body.replace("-", "+").replace("_", "/")
    sealed = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    for spelling in (standard, sealed.hex(), base64.b32encode(sealed).decode(), body.swapcase()):
        if spelling != body:
            is_rejected(TASK_ID_PREFIX + spelling)
    is_rejected(body)
    is_rejected(TASK_ID_PREFIX.upper() + body)


@given(st.text())
@example("")
@example(TASK_ID_PREFIX)
@example(TASK_ID_PREFIX + "\ud800")
@example(TASK_ID_PREFIX + "A" * 100_000)
def test_anything_else(text: str) -> None:
    """No other text is an id, and none is answered in another way."""
    is_rejected(text)
    is_rejected(TASK_ID_PREFIX + text)


@given(st.binary(max_size=200))
def test_sealed_something_else(plain: bytes) -> None:
    """What was sealed by the same key but is no reference is not found."""
    sealed = Keyring([NEW]).derive("task-id").encrypt(plain)
    is_rejected(TASK_ID_PREFIX + base64.urlsafe_b64encode(sealed).rstrip(b"=").decode())


@given(references)
def test_rotation(reference: TaskReference) -> None:
    """An id outlives the key it was sealed with until that is taken off the keyring."""
    old = TaskIdCodec(Keyring([OLD]).derive("task-id")).encode(reference)
    assert TaskIdCodec(Keyring([NEW, OLD]).derive("task-id")).decode(old) == reference
    is_rejected(old)


@given(references)
def test_other_purpose(reference: TaskReference) -> None:
    """An id that was sealed for another purpose is not found."""
    is_rejected(TaskIdCodec(Keyring([NEW]).derive("user-key")).encode(reference))
