"""Encryption keys and the generated development secrets."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.crypto import (
    GeneratedSecrets,
    Keyring,
    SecretFileError,
    generate_secret_key,
    load_or_create_secrets,
    parse_secret_key,
)

OLD, NEW = b"o" * 32, b"n" * 32


@given(st.binary(max_size=300))
def test_round_trip(plain: bytes) -> None:
    cipher = Keyring([NEW]).derive("user-key")
    assert cipher.decrypt(cipher.encrypt(plain)) == plain
    assert cipher.encrypt(plain) == cipher.encrypt(plain)


@given(st.binary(max_size=100), st.data())
def test_altered_ciphertext_is_rejected(plain: bytes, data: st.DataObject) -> None:
    cipher = Keyring([NEW]).derive("user-key")
    encrypted = bytearray(cipher.encrypt(plain))
    encrypted[data.draw(st.integers(0, len(encrypted) - 1))] ^= data.draw(st.integers(1, 255))
    assert cipher.decrypt(bytes(encrypted)) is None


@given(st.binary(max_size=100))
def test_other_bytes_are_rejected(encrypted: bytes) -> None:
    assert Keyring([NEW]).derive("user-key").decrypt(encrypted) is None


def test_purposes_are_separate() -> None:
    keyring = Keyring([NEW])
    assert keyring.derive("task-id").decrypt(keyring.derive("user-key").encrypt(b"x")) is None
    assert keyring.derive("task-id").encrypt(b"x") != keyring.derive("user-key").encrypt(b"x")


def test_key_rotation() -> None:
    old, both, new = (Keyring(keys).derive("task-id") for keys in ([OLD], [NEW, OLD], [NEW]))
    assert both.decrypt(old.encrypt(b"x")) == b"x"
    assert both.encrypt(b"x") == new.encrypt(b"x")
    assert new.decrypt(old.encrypt(b"x")) is None


@pytest.mark.parametrize("keys", [[], [b"short"], [NEW, b"n" * 33]])
def test_invalid_keys(keys: list[bytes]) -> None:
    with pytest.raises(ValueError, match="needs at least one key, each of 32 bytes"):
        Keyring(keys)


def test_generated_keys() -> None:
    first, second = generate_secret_key(), generate_secret_key()
    assert len(parse_secret_key(first)) == 32
    assert parse_secret_key(first) == parse_secret_key(first.rstrip("="))
    assert first != second


def test_dev_secrets_are_generated_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    first = load_or_create_secrets(folder)
    assert load_or_create_secrets(folder) == first
    assert len(first.admin_token) >= 32
    assert sorted(file.name for file in folder.iterdir()) == ["admin.token", "secret.key"]
    for name in ("admin.token", "secret.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert first.admin_token not in repr(first)


def test_concurrent_starts_agree_on_the_secrets(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def load(_: int) -> GeneratedSecrets:
        start.wait()
        return load_or_create_secrets(tmp_path)

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(load, range(8)))
    assert len({secrets.admin_token for secrets in results}) == 1
    assert len({secrets.secret_keys for secrets in results}) == 1


def test_first_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(source: str, target: Path) -> None:
        Path(target).write_text("theirs")
        real_link(source, target)

    (tmp_path / "secret.key").write_text(generate_secret_key())
    real_link = os.link
    monkeypatch.setattr(os, "link", overtaken)
    assert load_or_create_secrets(tmp_path).admin_token == "theirs"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["admin.token", "secret.key"]


@pytest.mark.parametrize("content", [b"", b"not a key", b"c2hvcnQ=", b"\xff\xff"])
def test_damaged_key_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret.key").write_bytes(content)
    with pytest.raises(SecretFileError, match=r"secret\.key|can't keep the gateway's secrets"):
        load_or_create_secrets(tmp_path)
    assert (tmp_path / "secret.key").read_bytes() == content


def test_empty_token_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text("\n")
    with pytest.raises(SecretFileError, match=r"admin\.token is empty"):
        load_or_create_secrets(tmp_path)


def test_unusable_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SecretFileError, match=r"can't keep the gateway's secrets in .*file"):
        load_or_create_secrets(tmp_path / "file")
