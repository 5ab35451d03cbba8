"""The registry as a TOML file."""

from __future__ import annotations

import io
import os
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given

from service.api.admin_schemas import AccountEntry, RegistryBody, SecretEntry, TenantEntry, TokenEntry, WebhookEntry
from service.cli.common import CommandError
from service.cli.registry import FILE_HEADER, format_registry_file, read_registry_file
from tests.unit.registry_strategies import ANY_EXPIRY, ENVIRONMENT, registry_documents, without_secrets

WHOLE = """
[accounts.main]
id = 17
user_key = { env = "KEY_ONE" }
base_url = "https://upstream.example"
floor_count = 3
floor_money = 0.5
max_price = { upscale = 1.25, face-enhance = 2 }

[tenants.shop]
id = 18
accounts = ["main"]
limits = [{ window = "day", tasks = 5 }, { window = "month", money = 99.99 }]
max_active = 4
spending_mode = "count_only"
kinds = ["upscale"]
state = "read-only"
webhook = { url = "https://hooks.example/", allow = ["10.0.0.0/8"], secret = { env = "HOOK_ONE" } }

[tenants.shop.tokens.0123456789ab]
sha256 = "00000000000000000000000000000000000000000000000000000000000000ff"
label = "web shop"
created_at = 2026-01-02T03:04:05.678901Z
expires_at = 2027-01-31T12:00:00+01:00
"""


def read_text(text: str) -> RegistryBody:
    with mock.patch.dict(os.environ, ENVIRONMENT):
        return read_registry_file(io.BytesIO(text.encode()))


def read_errors(text: str) -> list[str]:
    with pytest.raises(CommandError) as raised:
        read_text(text)
    first, *lines = raised.value.message.splitlines()
    assert first.endswith("can't be applied:")
    return [line.strip() for line in lines]


@given(registry_documents(expiries=ANY_EXPIRY))
def test_round_trip(body: RegistryBody) -> None:
    text = format_registry_file(without_secrets(body))
    again = read_text(text)
    assert again == body
    assert format_registry_file(without_secrets(again)) == text
    assert not any(secret in text for secret in ENVIRONMENT.values())


def test_full_file() -> None:
    body = read_text(WHOLE)
    assert body.accounts["main"].floor_money == 0.5
    assert body.accounts["main"].user_key == SecretEntry(env="KEY_ONE", value="key-one")
    shop = body.tenants["shop"]
    assert shop.webhook
    assert shop.webhook.secret == SecretEntry(env="HOOK_ONE", value=ENVIRONMENT["HOOK_ONE"])
    assert shop.tokens["0123456789ab"].created_at == datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    assert tomllib.loads(format_registry_file(without_secrets(body))) == tomllib.loads(WHOLE)


def test_fields_of_former_versions() -> None:
    body = read_text(WHOLE.replace("spending_mode", "purse").replace('state = "read-only"', "disabled = true"))
    assert body == read_text(WHOLE)
    assert "purse" not in format_registry_file(without_secrets(body))
    assert read_errors('[tenants.shop]\naccounts = []\npurse = "count_only"\nspending_mode = "count_only"') == [
        "tenants.shop.purse: is the former name of spending_mode: send only one of them"
    ]


def test_empty_file() -> None:
    assert read_text("") == RegistryBody()


def test_secrets_from_files(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "main").write_text("key-in-a-file\n")
    file = tmp_path / "registry.toml"
    file.write_text('accounts.main.user_key.file = "secrets/main"')
    with file.open("rb") as opened:
        secret = read_registry_file(opened).accounts["main"].user_key
    assert secret == SecretEntry(file="secrets/main", value="key-in-a-file")


def test_all_errors_are_reported() -> None:
    errors = read_errors(
        """
        [accounts.main]
        user_key = { env = "NOBODY_SET_IT" }
        max_price = { upscale = 0.001, upscal = 1, vectorize = "1" }
        floor_cuont = 3
        floor_count = 1.5
        [accounts.Loud]
        [accounts.spare]
        user_key = { env = "A", file = "b" }
        base_url = "ftp://x"
        [tenants."with.dots"]
        accounts = ["main", "main"]
        limits = [{ window = "day", tasks = -1 }, { window = "fortnight", money = 1 }, { window = "day" }]
        disabled = "no"
        max_active = true
        kinds = "upscale"
        [tenants.shop]
        limits = [{ window = "day" }, { window = "day", money = 0.001 }]
        webhook = { url = "x", allow = ["-"], secret = { env = "KEY_ONE" } }
        [tenants.shop.tokens]
        short = { sha256 = "ff" }
        0123456789ab = { sha256 = "g", expires_at = 2027-01-01T00:00:00, label = 3 }
        [tenants.press]
        accounts = []
        tokens.0123456789ab = { sha256 = "00000000000000000000000000000000000000000000000000000000000000ff", \
created_at = 1960-01-01T00:00:00Z }
        [tenant.x]
        """
    )
    kinds = "upscale or vectorize or face-enhance or seamless"
    name = "must be up to 63 lower-case letters, digits, dots, dashes and underscores, a letter or digit first"
    windows = "minute or hour or day or month or total"
    url = "must be a URL such as https://host/path, at most 2048 characters long, without credentials or fragment"
    assert sorted(errors) == sorted(
        [
            "accounts.main.user_key: there is no environment variable NOBODY_SET_IT",
            "accounts.main.floor_cuont: is unknown: did you mean floor_count?",
            "accounts.main.floor_count: must be a whole number from 0 to 1000000000000",
            f"accounts.main.max_price.upscal: as a name must be {kinds}: did you mean upscale?",
            "accounts.main.max_price.vectorize: must be a number from 0 to 10000000000",
            f"accounts.Loud: {name}",
            "accounts.spare.user_key: must have either env or file",
            (
                "accounts.spare.base_url: must be a URL such as http://host or https://host/path, without credentials, "
                "query or fragment"
            ),
            'tenants."with.dots".accounts: must name each account at most once',
            'tenants."with.dots".limits[0].tasks: must be a whole number from 0 to 1000000000000',
            f'tenants."with.dots".limits[1].window: must be {windows}',
            'tenants."with.dots".disabled: must be true or false',
            'tenants."with.dots".max_active: must be a whole number from 0 to 1000000000000',
            'tenants."with.dots".kinds: must be a list',
            "tenants.shop.accounts: is required",
            "tenants.shop.limits: must name each window at most once",
            "tenants.shop.limits[0]: must limit tasks, money or both",
            "tenants.shop.limits[1].money: must be an amount in yuan with at most two decimals",
            f"tenants.shop.webhook.url: {url}",
            "tenants.shop.webhook.allow[0]: must be a host, or a network such as 10.0.0.0/8",
            "tenants.shop.webhook.secret: must be whsec_ and the base64 of 24 to 64 random bytes",
            "tenants.shop.tokens.short: as a name must be 12 hexadecimal digits in lower case",
            "tenants.shop.tokens.short.sha256: must be 64 hexadecimal digits in lower case",
            "tenants.shop.tokens.0123456789ab.sha256: must be 64 hexadecimal digits in lower case",
            (
                "tenants.shop.tokens.0123456789ab.expires_at: must be a time with a time zone, such as "
                "2030-01-31T12:00:00Z"
            ),
            "tenants.shop.tokens.0123456789ab.label: must be text of at most 200 characters",
            "tenants.press.tokens.0123456789ab.created_at: must be between the years 1970 and 9999",
            "tenant: is unknown: did you mean tenants?",
        ]
    )


@pytest.mark.parametrize(
    "secret",
    ['"sk-0123456789"', '{ value = "sk-0123456789" }', '{ env = "sk-0123456789", value = "" }', '["sk-0123456789"]'],
)
def test_inline_secrets_are_refused(secret: str) -> None:
    (key, hook) = read_errors(
        f"""
        [accounts.main]
        user_key = {secret}
        [tenants.shop]
        accounts = []
        webhook = {{ url = "https://hooks.example", secret = {secret} }}
        """
    )
    assert key.startswith("accounts.main.user_key: must be a reference such as")
    assert hook.startswith("tenants.shop.webhook.secret: must be a reference such as")
    assert "sk-" not in key + hook


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ('{ env = "" }', "accounts.main.user_key.env: must be text of 1 to 4096 characters"),
        ("{ env = 3 }", "accounts.main.user_key.env: must be text of 1 to 4096 characters"),
        ('{ envv = "X" }', "accounts.main.user_key.envv: is unknown: did you mean env?"),
        ("{}", "accounts.main.user_key: must have either env or file"),
        ('{ file = "no/such/file" }', "accounts.main.user_key: no/such/file can't be read: No such file or directory"),
        ('{ file = "/dev/null" }', "accounts.main.user_key: /dev/null contains no secret"),
        ('{ env = "BLANKS" }', "accounts.main.user_key: must be printable ASCII without spaces"),
    ],
)
def test_missing_secret_sources(monkeypatch: pytest.MonkeyPatch, entry: str, expected: str) -> None:
    monkeypatch.setenv("BLANKS", "sk 0123")
    assert read_errors(f"accounts.main.user_key = {entry}") == [expected]


def test_binary_secret_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    assert read_errors(f'accounts.main.user_key.file = "{tmp_path / "key"}"') == [
        f"accounts.main.user_key: {tmp_path / 'key'} contains no secret"
    ]


@pytest.mark.parametrize("text", [b"accounts = 3\ntenants = []", b"accounts.main = 3\ntenants.shop = 'x'"])
def test_expected_tables(text: bytes) -> None:
    assert [error.partition(": ")[2] for error in read_errors(text.decode())] == ["must be a table", "must be a table"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"x = ", "the input is not TOML: Invalid value (at end of document)"),
        (b"# \xff", "the input is not TOML: not UTF-8"),
    ],
)
def test_invalid_toml(content: bytes, expected: str) -> None:
    with pytest.raises(CommandError) as raised:
        read_registry_file(io.BytesIO(content))
    assert raised.value.message == expected


def test_header_comment_lists_unreferenced_secrets() -> None:
    hook = WebhookEntry("https://hooks.example/")
    token = TokenEntry("0" * 64)
    body = RegistryBody(
        {"main": AccountEntry(), "spare": AccountEntry(user_key=SecretEntry(env="KEY_ONE"))},
        {
            "with.dots": TenantEntry(accounts=[], webhook=hook),
            "shop": TenantEntry(accounts=[], tokens={"0" * 12: token}),
        },
    )
    text = format_registry_file(body)
    assert text.startswith(FILE_HEADER)
    assert text.removeprefix(FILE_HEADER).splitlines()[2:4] == [
        "#   accounts.main.user_key",
        '#   tenants."with.dots".webhook.secret',
    ]
    assert (
        format_registry_file(RegistryBody({"spare": body.accounts["spare"]}))
        .removeprefix(FILE_HEADER)
        .startswith("\n[accounts.spare.")
    )
