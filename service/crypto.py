"""Encryption with derived AES-SIV keys, and the generated secrets of development."""

from __future__ import annotations

import base64
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Struct
from msgspec.structs import replace

from service.domain.errors import NotFound
from service.domain.hosts import url_origin
from service.domain.tasks import TaskReference
from service.domain.tenants import Account

KEY_BYTES = 32
_DERIVED_BYTES = 64
_ADMIN_TOKEN_BYTES = 32


class SecretFileError(Exception):
    """A secret in the data folder can't be read or created; the message contains no secret."""


class AesSivCipher:
    """A cipher for one purpose; ciphertexts of other purposes, or with other associated data, are not decrypted.

    `on_plaintext` is called with each plaintext before it is encrypted or returned.
    """

    def __init__(self, ciphers: Sequence[AESSIV], on_plaintext: Callable[[bytes], None]) -> None:
        self._ciphers = tuple(ciphers)
        self._on_plaintext = on_plaintext

    def encrypt(self, plaintext: bytes, *associated_data: bytes) -> bytes:
        """Encrypt with the first key; deterministic."""
        self._on_plaintext(plaintext)
        return self._ciphers[0].encrypt(plaintext, list(associated_data))

    def decrypt(self, ciphertext: bytes, *associated_data: bytes) -> bytes | None:
        """Decrypt with any of the keys; None if none matches or the bytes were altered."""
        for cipher in self._ciphers:
            with suppress(InvalidTag):
                plaintext = cipher.decrypt(ciphertext, list(associated_data))
                self._on_plaintext(plaintext)
                return plaintext
        return None


class Keyring:
    """Secret keys in order: the first encrypts, all decrypt, so that a new one can be put in front.

    AES-SIV needs no nonce that could be repeated, and gives the same reference the same id.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"a keyring needs at least one key, each of {KEY_BYTES} bytes")
        self._keys = tuple(keys)

    def derive(self, purpose: str, on_plaintext: Callable[[bytes], None] = lambda _: None) -> AesSivCipher:
        info = f"imaging-gateway/{purpose}".encode()
        derived = [HKDF(SHA256(), _DERIVED_BYTES, salt=None, info=info).derive(key) for key in self._keys]
        return AesSivCipher([AESSIV(key) for key in derived], on_plaintext)


class UserKeyCipher:
    """Encrypts the keys of accounts, each for the id of its account and the origin of its base URL.

    A key is decrypted for no other account or origin, so that no change of the registry sends it elsewhere. The base
    URL of accounts without one is `default_url`. `on_key` is called as `on_plaintext` of AesSivCipher.
    """

    def __init__(self, keyring: Keyring, default_url: str, on_key: Callable[[bytes], None] = lambda _: None) -> None:
        self._cipher = keyring.derive("user-key", on_key)
        self._default_url = default_url

    def origin(self, account: Account) -> str:
        return url_origin(account.base_url or self._default_url)

    def encrypt(self, user_key: bytes, account: Account) -> bytes:
        return self._cipher.encrypt(user_key, *self._associated_data(account))

    def decrypt(self, account: Account) -> bytes | None:
        """Decrypt the key of an account; None if none of the secret keys does, or it is bound to another origin."""
        return self._cipher.decrypt(account.user_key, *self._associated_data(account))

    def bind(self, account: Account) -> Account | None:
        """Bind a key as data version 3 has it, without associated data; None if none of the secret keys decrypts it."""
        user_key = self._cipher.decrypt(account.user_key)
        return None if user_key is None else replace(account, user_key=self.encrypt(user_key, account))

    def _associated_data(self, account: Account) -> tuple[bytes, bytes]:
        return str(account.id).encode(), self.origin(account).encode()


TASK_ID_PREFIX = "task_"
_MAX_DECODED_IDS = 10_000
"""Ids whose references are kept, of about 0.5 KB each. Only valid ones are."""


class TaskIdCodec:
    """Encrypts references to task ids and back."""

    def __init__(self, cipher: AesSivCipher) -> None:
        self._cipher = cipher
        self.decode = lru_cache(_MAX_DECODED_IDS)(self._decode)

    def encode(self, reference: TaskReference) -> str:
        return self._format_id(self._cipher.encrypt(msgspec.msgpack.encode(reference)))

    def _decode(self, task_id: str) -> TaskReference:
        """Return the reference of an id. Raises NotFound for anything that `encode` did not return."""
        text = task_id.removeprefix(TASK_ID_PREFIX)
        try:
            ciphertext = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            plaintext = self._cipher.decrypt(ciphertext) if self._format_id(ciphertext) == task_id else None
            if plaintext is not None:
                return msgspec.msgpack.decode(plaintext, type=TaskReference)
        except ValueError:  # includes binascii.Error and msgspec.DecodeError
            pass
        raise NotFound("There is no such task.")

    @staticmethod
    def _format_id(ciphertext: bytes) -> str:
        return TASK_ID_PREFIX + base64.urlsafe_b64encode(ciphertext).rstrip(b"=").decode()


class GeneratedSecrets(Struct, frozen=True):
    """Secrets of a development gateway, kept in its data folder."""

    secret_keys: tuple[bytes, ...]
    admin_token: str

    def __repr__(self) -> str:
        return "GeneratedSecrets(...)"


def generate_secret_key() -> str:
    """Return a new key in the format of GATEWAY_SECRET_KEYS."""
    return base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def parse_secret_key(text: str) -> bytes:
    """Decode standard or URL-safe base64. Raises ValueError without the text."""
    try:
        digits = text.replace("-", "+").replace("_", "/").rstrip("=")
        key = base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError:
        raise ValueError("is not base64") from None
    if len(key) != KEY_BYTES:
        raise ValueError(f"is {len(key)} bytes long, not {KEY_BYTES}")
    return key


def load_or_create_secrets(folder: Path) -> GeneratedSecrets:
    """Read `secret.key` and `admin.token` in the data folder, creating missing ones; for development.

    An existing file is never replaced: without its key nothing can be decrypted. Raises SecretFileError.
    """
    key_file, token_file = folder / "secret.key", folder / "admin.token"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key_text = _load_or_create(key_file, generate_secret_key())
        token = _load_or_create(token_file, secrets.token_urlsafe(_ADMIN_TOKEN_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        name = getattr(error, "filename", None) or folder
        raise SecretFileError(f"can't keep the gateway's secrets in {name}: {reason}") from error
    try:
        key = parse_secret_key(key_text)
    except ValueError as error:
        raise SecretFileError(f"{key_file} is damaged: what it holds {error}") from None
    if not token:
        raise SecretFileError(f"{token_file} is empty")
    return GeneratedSecrets((key,), token)


def _load_or_create(path: Path, default: str) -> str:
    """Return the content of a file, creating it with `default` if missing.

    The file is written under another name and linked, so that of two gateways that start at once both use the first
    one, and neither reads half a file.
    """
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"{default}\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()
    return path.read_text().strip()
