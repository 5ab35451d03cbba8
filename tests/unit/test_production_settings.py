"""Checks of production settings."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from service.crypto import generate_secret_key
from service.settings import Settings, SettingsError, production_warnings

ALLOWED = {"GATEWAY_UPSTREAM_CLEARTEXT": "allow"}
TOKEN_HINT = "must not be one that can be guessed in production: `openssl rand -hex 32` makes one"
KEY_HINT = "must be random bytes in production, which number 1 is not: `openssl rand -base64 32` makes one"


def make_environment(**settings: str) -> dict[str, str]:
    """Make an environment that passes the checks, with changes."""
    return {
        "GATEWAY_ENV": "production",
        "GATEWAY_REDIS_URL": "redis://store",
        "GATEWAY_UPSTREAM_URL": "https://images.example",
        "GATEWAY_SECRET_KEYS": generate_secret_key(),
        "GATEWAY_ADMIN_TOKEN": "3f8a1c5e9b7d2046f1e3a5c7d9b80246",
    } | settings


def read_errors(**settings: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.load(make_environment(**settings))
    return caught.value.errors


def read_warned_settings(**settings: str) -> list[str]:
    loaded = Settings.load(make_environment(**settings))
    return [field for field, _ in production_warnings(vars(loaded))]


@pytest.mark.parametrize("token", ["t" * 40, "changeme" * 4, "0123456789abcdef" * 2, "abcde" * 8 + "abc"])
def test_guessable_tokens_are_refused(token: str) -> None:
    assert read_errors(GATEWAY_ADMIN_TOKEN=token) == (f"GATEWAY_ADMIN_TOKEN {TOKEN_HINT}",)


@pytest.mark.parametrize("key", [bytes(32), b"s" * 32, bytes(range(150, 158)) * 4, b"correct horse battery staple 123"])
def test_guessable_keys_are_refused(key: bytes) -> None:
    assert read_errors(GATEWAY_SECRET_KEYS=base64.b64encode(key).decode()) == (f"GATEWAY_SECRET_KEYS {KEY_HINT}",)


def test_guessable_key_is_named_by_position() -> None:
    weak = base64.b64encode(b"s" * 32).decode()
    (fault,) = read_errors(GATEWAY_SECRET_KEYS=f"{generate_secret_key()},{weak}")
    assert "number 2 is not" in fault
    assert weak not in fault


def test_development_accepts_weak_settings() -> None:
    environ = make_environment(
        GATEWAY_ADMIN_TOKEN="t", GATEWAY_SECRET_KEYS="A" * 43, GATEWAY_UPSTREAM_URL="http://images.example"
    )
    Settings.load(environ | {"GATEWAY_ENV": "development", "GATEWAY_REDIS_URL": "redis://8.8.8.8"})


@pytest.mark.parametrize("url", ["http://images.example/api", "http://8.8.8.8", "http://[2606:4700::1111]:80"])
def test_public_upstream_without_tls_is_refused(url: str) -> None:
    (fault,) = read_errors(GATEWAY_UPSTREAM_URL=url)
    assert fault.startswith("GATEWAY_UPSTREAM_URL must be https:// in production")
    assert fault.endswith("GATEWAY_UPSTREAM_CLEARTEXT=allow takes the risk")
    assert read_warned_settings(GATEWAY_UPSTREAM_URL=url, **ALLOWED) == ["upstream_url"]


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example",
        "http://127.0.0.1:8082",
        "http://localhost:8082",
        "http://10.1.2.3",
        "http://[fd00::1]",
        "http://egress",
        "http://egress.shop.svc.cluster.local",
        "http://egress.corp.internal.",
    ],
)
def test_private_upstream_without_tls_is_accepted(url: str) -> None:
    """It may be an egress proxy."""
    assert read_warned_settings(GATEWAY_UPSTREAM_URL=url) == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://8.8.8.8", ["must be rediss://", "must have a password"]),
        ("redis://:word@8.8.8.8", ["must be rediss://"]),
        ("rediss://8.8.8.8", ["must have a password"]),
        ("redis+sentinel://10.0.0.1,8.8.8.8/main", ["must be rediss://", "must have a password"]),
    ],
)
def test_public_store_needs_tls_and_password(url: str, expected: list[str]) -> None:
    errors = read_errors(GATEWAY_REDIS_URL=url)
    assert len(errors) == len(expected)
    for fault, words in zip(errors, expected, strict=True):
        assert fault.startswith(f"GATEWAY_REDIS_URL {words}")
        assert fault.endswith("since its address is public")


@pytest.mark.parametrize(
    ("url", "times"),
    [
        ("redis://10.0.0.1", 0),
        ("redis://store.shop.svc", 0),
        ("unix:///run/store.sock", 0),
        ("rediss://:word@store.example", 0),
        ("rediss://store.example?ssl_certfile=/c&ssl_keyfile=/k", 0),
        ("rediss://:word@8.8.8.8", 0),
        ("redis://store.example", 2),
        ("redis://:word@store.example", 1),
        ("rediss://:word@store.example?ssl_cert_reqs=none", 1),
    ],
)
def test_named_store_is_a_warning(url: str, times: int) -> None:
    """Its address may be private."""
    assert read_warned_settings(GATEWAY_REDIS_URL=url) == ["redis_url"] * times


def test_debug_log_is_a_warning() -> None:
    assert read_warned_settings(GATEWAY_LOG_LEVEL="debug") == ["log_level"]


def test_errors_contain_no_secret(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hush!!" * 6)
    environ = make_environment(GATEWAY_REDIS_URL="redis://me:hush@8.8.8.8", GATEWAY_ADMIN_TOKEN="")
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ | {"GATEWAY_ADMIN_TOKEN_FILE": str(tmp_path / "token")})
    assert len(caught.value.errors) == 2
    assert "hush" not in str(caught.value)
