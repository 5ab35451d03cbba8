"""Encryption, task ids, tokens and the generated development secrets."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.api.admin_schemas import AccountBody
from service.crypto import (
    TASK_ID_PREFIX,
    Keyring,
    SecretFileError,
    TaskIdCodec,
    generate_secret_key,
    load_or_create_secrets,
)
from service.domain.errors import InvalidOptions, NotFound
from service.domain.hosts import url_origin
from service.domain.tasks import Kind, TaskReference

OLD, NEW = b"o" * 32, b"n" * 32
CIPHER = Keyring([NEW]).derive("webhook-secret")
CODEC = TaskIdCodec(Keyring([NEW]).derive("task-id"))
REFERENCE = TaskReference(7, 3, Kind.SEAMLESS, 1_750_000_000_000, "r-1", "abc-123")
TASK_ID = CODEC.encode(REFERENCE)
TEXTS = st.text(max_size=40, alphabet=st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(0, 2**53)
REFERENCES = st.builds(TaskReference, NUMBERS, NUMBERS, st.sampled_from(Kind), NUMBERS, TEXTS, TEXTS)
BASE64_URL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@given(st.binary(max_size=300), st.data())
def test_ciphertext_decrypts_unaltered_and_for_its_purpose_only(plain: bytes, data: st.DataObject) -> None:
    encrypted = CIPHER.encrypt(plain)
    assert encrypted == CIPHER.encrypt(plain) != Keyring([NEW]).derive("task-id").encrypt(plain)
    assert CIPHER.decrypt(encrypted) == plain
    assert Keyring([NEW]).derive("task-id").decrypt(encrypted) is None
    altered = bytearray(encrypted)
    altered[data.draw(st.integers(0, len(encrypted) - 1))] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(altered), plain):
        assert CIPHER.decrypt(wrong) is None


@given(st.sampled_from(["http://", "HTTPS://"]), st.text("aA0.:-_@\\[]/%", max_size=12))
@example("http://", "[::A]:080/path")
@example("http://", "a.test\\@b.test")
def test_origin_is_the_server_to_which_the_client_connects(scheme: str, rest: str) -> None:
    try:
        base_url = AccountBody(base_url=scheme + rest).to_desired("main").account.base_url or ""
        url = httpx2.URL(base_url)
    except (InvalidOptions, httpx2.InvalidURL):
        return
    port = {"http": 80, "https": 443}[url.scheme] if url.port is None else url.port
    assert url_origin(base_url).lower() == f"{url.scheme}://{url.raw_host.decode()}:{port}".lower()


def test_key_rotation() -> None:
    old, both, new = (Keyring(keys).derive("task-id") for keys in ([OLD], [NEW, OLD], [NEW]))
    assert both.decrypt(old.encrypt(b"x")) == b"x"
    assert both.encrypt(b"x") == new.encrypt(b"x")
    assert new.decrypt(old.encrypt(b"x")) is None
    assert TaskIdCodec(both).decode(TaskIdCodec(old).encode(REFERENCE)) == REFERENCE
    assert_no_task_id(TaskIdCodec(old).encode(REFERENCE))


def assert_no_task_id(text: str) -> None:
    with pytest.raises(NotFound):
        CODEC.decode(text)


@given(REFERENCES, REFERENCES)
def test_task_ids_are_distinct_and_decode(one: TaskReference, other: TaskReference) -> None:
    task_id = CODEC.encode(one)
    assert CODEC.decode(task_id) == one
    assert (task_id == CODEC.encode(other)) == (one == other)
    assert task_id.startswith(TASK_ID_PREFIX)
    assert set(task_id) <= set(BASE64_URL)


def test_every_character_and_the_spelling_of_a_task_id_count() -> None:
    # Even where the alphabet has unused bits.
    for place, letter in enumerate(TASK_ID):
        assert_no_task_id(TASK_ID[:place])
        for other in (BASE64_URL + "é=\n").replace(letter, ""):
            assert_no_task_id(TASK_ID[:place] + other + TASK_ID[place + 1 :])
    body = TASK_ID.removeprefix(TASK_ID_PREFIX)
    encrypted = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    assert_no_task_id(body)
    for spelling in ({body.replace("-", "+").replace("_", "/")} - {body}) | {encrypted.hex()}:
        assert_no_task_id(TASK_ID_PREFIX + spelling)


@given(st.text(min_size=1), st.binary(max_size=200))
@example("=", b"")
@example("\n", b"")
@example("\ud800", b"")
@example(TASK_ID_PREFIX, b"")
@example("A" * 100_000, b"")
def test_other_texts_and_contents_are_no_task_id(text: str, content: bytes) -> None:
    encrypted = Keyring([NEW]).derive("task-id").encrypt(content)
    foreign = TASK_ID_PREFIX + base64.urlsafe_b64encode(encrypted).rstrip(b"=").decode()
    within = TASK_ID[:20] + text + TASK_ID[20:]
    for wrong in (text, TASK_ID_PREFIX + text, TASK_ID + text, text + TASK_ID, within, foreign):
        assert_no_task_id(wrong)
    assert_no_task_id(TaskIdCodec(CIPHER).encode(REFERENCE))


def test_development_secrets_are_generated_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    first = load_or_create_secrets(folder)
    assert load_or_create_secrets(folder) == first
    assert len(first.admin_token) >= 32
    assert first != load_or_create_secrets(tmp_path / "other")
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {
        "admin.token": 0o600,
        "secret.key": 0o600,
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert first.admin_token not in repr(first)


def test_first_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_link = os.link

    def overtaken(source: str, target: Path) -> None:
        Path(target).write_text("theirs")
        real_link(source, target)

    (tmp_path / "secret.key").write_text(generate_secret_key())
    monkeypatch.setattr(os, "link", overtaken)
    assert load_or_create_secrets(tmp_path).admin_token == "theirs"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["admin.token", "secret.key"]


DAMAGED = [("admin.token", b"\n"), *(("secret.key", content) for content in (b"", b"no key", b"c2hvcnQ=", b"\xff\xff"))]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_damaged_secret_is_kept_and_reported(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SecretFileError):
        load_or_create_secrets(tmp_path)
    assert (tmp_path / name).read_bytes() == content
    with pytest.raises(SecretFileError):  # a file in place of the folder
        load_or_create_secrets(tmp_path / name)
