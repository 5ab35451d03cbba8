"""Settings from the environment."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.crypto import generate_secret_key
from service.settings import SETTINGS, Environment, LogLevel, Role, Settings, SettingsError

KEY = bytes(range(200, 232))
PAIRS = "must be pairs such as general=通用模型,anime=…, each name once and in lower case"
PRODUCTION = {
    "GATEWAY_ENV": "production",
    "GATEWAY_REDIS_URL": "redis://store",
    "GATEWAY_UPSTREAM_URL": "https://images.example",
    "GATEWAY_SECRET_KEYS": base64.b64encode(KEY).decode(),
    "GATEWAY_ADMIN_TOKEN": "a-token-that-is-hard-to-guess-0123456789",
}


def read_errors(environ: Mapping[str, str]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return caught.value.errors


def error_message(environ: Mapping[str, str]) -> str:
    try:
        Settings.load(environ)
    except SettingsError as error:
        return str(error)
    return ""


def test_defaults() -> None:
    settings = Settings.load({"HOME": "/somewhere"})
    assert settings.env is Environment.DEVELOPMENT
    assert not settings.is_production
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert (settings.ops_host, settings.ops_port) == ("127.0.0.1", 8081)
    assert settings.sandbox_port == 8082
    assert settings.data_dir == Path(".gateway")
    assert settings.redis_url is settings.upstream_url is settings.upstream_user_key is settings.admin_token is None
    assert settings.secret_keys == ()
    assert settings.key_prefix == "gw"
    assert settings.max_image_bytes == 32 << 20
    assert settings.max_image_pixels == 25_000_000
    assert (settings.poll_seconds, settings.lease_seconds, settings.task_retention_days) == (2.5, 180, 30)
    assert (settings.role, settings.log_level) == (Role.ALL, LogLevel.INFO)
    assert settings.catalogue.vendor_word("model", "general") == "通用模型"
    assert settings.catalogue.vendor_word("style", "general") == "通用风格"


def test_given_values() -> None:
    settings = Settings.load(
        PRODUCTION
        | {
            "GATEWAY_HOST": "::",
            "GATEWAY_PORT": "80",
            "GATEWAY_OPS_HOST": "10.0.0.1",
            "GATEWAY_OPS_PORT": "0",
            "GATEWAY_MAX_IMAGE_BYTES": "1048576",
            "GATEWAY_POLL_SECONDS": "0.5",
            "GATEWAY_ROLE": "worker",
            "GATEWAY_MODELS": "general=通用模型, anime=动漫",
            "GATEWAY_LOG_LEVEL": "warning",
        }
    )
    assert settings.is_production
    assert (settings.host, settings.port, settings.ops_host, settings.ops_port) == ("::", 80, "10.0.0.1", 0)
    assert settings.redis_url == "redis://store"
    assert settings.upstream_url == "https://images.example"
    assert settings.secret_keys == (KEY,)
    assert settings.max_image_bytes == 1 << 20
    assert settings.poll_seconds == 0.5
    assert settings.role is Role.WORKER
    assert settings.models == {"general": "通用模型", "anime": "动漫"}
    assert settings.log_level is LogLevel.WARNING


def test_ops_host_follows_host() -> None:
    assert Settings.load({"GATEWAY_HOST": "0.0.0.0"}).ops_host == "0.0.0.0"


def test_several_keys() -> None:
    other = bytes(32)
    texts = (base64.b64encode(KEY).decode(), base64.urlsafe_b64encode(KEY).decode(), base64.b64encode(other).decode())
    assert Settings.load({"GATEWAY_SECRET_KEYS": ",\n".join(texts)}).secret_keys == (KEY, KEY, other)
    assert len(Settings.load({"GATEWAY_SECRET_KEYS": generate_secret_key()}).secret_keys[0]) == 32


@pytest.mark.parametrize(("text", "value"), [("1024", 1024), ("64KiB", 65_536), ("5 MiB", 5 << 20), ("1 GiB", 1 << 30)])
def test_sizes(text: str, value: int) -> None:
    assert Settings.load({"GATEWAY_MAX_IMAGE_BYTES": text}).max_image_bytes == value


def test_from_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("  from-a-file\n")
    settings = Settings.load({"GATEWAY_ADMIN_TOKEN_FILE": str(tmp_path / "token"), "GATEWAY_ADMIN_TOKEN": ""})
    assert settings.admin_token == "from-a-file"


def test_empty_value_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    settings = Settings.load({"GATEWAY_PORT": "", "GATEWAY_OPS_PORT_FILE": str(tmp_path / "empty")})
    assert (settings.port, settings.ops_port) == (8080, 8081)


def test_invalid_files(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"x" * 70_000)
    (tmp_path / "port").write_text("8080")
    missing, data, large = (str(tmp_path / name) for name in ("missing", "bytes", "large"))
    assert read_errors(
        {
            "GATEWAY_HOST_FILE": missing,
            "GATEWAY_PORT": "1",
            "GATEWAY_PORT_FILE": str(tmp_path / "port"),
            "GATEWAY_KEY_PREFIX_FILE": data,
            "GATEWAY_MODELS_FILE": large,
        }
    ) == (
        f"GATEWAY_HOST can't be read from {missing}: No such file or directory",
        "GATEWAY_PORT and GATEWAY_PORT_FILE are both set: keep one",
        f"GATEWAY_KEY_PREFIX can't be read from {data}: it is not UTF-8 text",
        f"GATEWAY_MODELS can't be read from {large}: it is larger than 65536 bytes",
    )


@pytest.mark.parametrize(
    ("variable", "text", "fault"),
    [
        ("ENV", "staging", "must be development or production"),
        ("HOST", "a b", "must be a host name or an IP address to listen on"),
        ("PORT", "65536", "must be a whole number from 0 to 65535"),
        ("PORT", "٣", "must be a whole number from 0 to 65535"),
        ("PORT", "-1", "must be a whole number from 0 to 65535"),
        (
            "REDIS_URL",
            "http://x",
            "must be a URL that starts with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://",
        ),
        ("DATA_DIR", "a\0b", "must be the path of a folder"),
        ("KEY_PREFIX", "a{b}", "must be 1 to 32 letters, digits, dots, dashes or underscores"),
        ("UPSTREAM_URL", "ftp://x", "must be a URL such as http://host or https://host/path"),
        ("UPSTREAM_URL", "http://", "must be a URL such as http://host or https://host/path"),
        ("UPSTREAM_URL", "http://a b", "must be a URL such as http://host or https://host/path"),
        ("UPSTREAM_URL", "http://host:port", "must be a URL with a valid host and port"),
        ("UPSTREAM_URL", "http://[x", "must be a URL with a valid host and port"),
        ("UPSTREAM_URL", "http://me:secret@x", "must be a URL without credentials, query or fragment"),
        ("UPSTREAM_URL", "http://x?y=z", "must be a URL without credentials, query or fragment"),
        ("UPSTREAM_USER_KEY", "a\nb", "must be printable ASCII without spaces"),
        ("ADMIN_TOKEN", "schlüssel", "must be printable ASCII without spaces"),
        ("SECRET_KEYS", "a?b", "must be base64 of 32 bytes each, separated by commas: number 1 is not base64"),
        (
            "SECRET_KEYS",
            f"{base64.b64encode(KEY).decode()},c2hvcnQ=",
            "must be base64 of 32 bytes each, separated by commas: number 2 is 5 bytes long, not 32",
        ),
        ("MAX_IMAGE_BYTES", "1023", "must be a number of bytes, such as 33554432 or 32 MiB, from 1 KiB to 1 GiB"),
        ("MAX_IMAGE_BYTES", "a lot", "must be a number of bytes, such as 33554432 or 32 MiB, from 1 KiB to 1 GiB"),
        ("MAX_IMAGE_PIXELS", "0", "must be a whole number from 1 to 1000000000"),
        ("POLL_SECONDS", "nan", "must be a number from 0.05 to 60"),
        ("POLL_SECONDS", "soon", "must be a number from 0.05 to 60"),
        ("LEASE_SECONDS", "60", "must be a whole number from 90 to 3600"),
        ("TASK_RETENTION_DAYS", "366", "must be a whole number from 1 to 365"),
        ("ROLE", "none", "must be all or api or worker"),
        ("MODELS", "anime=动漫", "must have a pair for general, the default of a task"),
        (
            "STYLES",
            "general=a,general=b",
            PAIRS,
        ),
        ("STYLES", "general", PAIRS),
        ("LOG_LEVEL", "loud", "must be debug or info or warning or error"),
    ],
)
def test_invalid_values(variable: str, text: str, fault: str) -> None:
    assert read_errors({f"GATEWAY_{variable}": text}) == (f"GATEWAY_{variable} {fault}",)


def test_unknown_variables() -> None:
    assert read_errors({"GATEWAY_PROT": "1", "GATEWAY_REDIS_ULR_FILE": "x", "GATEWAY_ZZZ": "", "PATH": "/bin"}) == (
        "GATEWAY_PROT is not a setting: did you mean GATEWAY_PORT?",
        "GATEWAY_REDIS_ULR_FILE is not a setting: did you mean GATEWAY_REDIS_URL_FILE?",
        "GATEWAY_ZZZ is not a setting",
    )


def test_kubernetes_service_links() -> None:
    """Kubernetes creates such variables for a service called `gateway`."""
    hint = "is not a setting: Kubernetes sets it for a service of that name; set enableServiceLinks to false"
    environ = {"GATEWAY_SERVICE_HOST": "10.0.0.1", "GATEWAY_PORT_8080_TCP": "tcp://10.0.0.1:8080"}
    assert read_errors(environ) == (f"GATEWAY_PORT_8080_TCP {hint}", f"GATEWAY_SERVICE_HOST {hint}")


@pytest.mark.parametrize("missing", ["REDIS_URL", "UPSTREAM_URL", "SECRET_KEYS", "ADMIN_TOKEN"])
def test_production_refuses_development_settings(missing: str) -> None:
    environ = {name: text for name, text in PRODUCTION.items() if name != f"GATEWAY_{missing}"}
    (fault,) = read_errors(environ)
    assert fault.startswith(f"GATEWAY_{missing} must be given in production: ")


def test_production_refuses_a_short_token() -> None:
    (fault,) = read_errors(PRODUCTION | {"GATEWAY_ADMIN_TOKEN": "t" * 31})
    assert fault == "GATEWAY_ADMIN_TOKEN must have at least 32 characters in production"


@pytest.mark.parametrize("role", ["api", "worker"])
def test_roles_need_a_common_store(role: str) -> None:
    (fault,) = read_errors({"GATEWAY_ROLE": role})
    assert fault == f"GATEWAY_ROLE={role} needs GATEWAY_REDIS_URL: the embedded server belongs to one process"


def test_user_key_needs_an_upstream() -> None:
    (fault,) = read_errors({"GATEWAY_UPSTREAM_USER_KEY": "mine"})
    assert fault == "GATEWAY_UPSTREAM_USER_KEY needs GATEWAY_UPSTREAM_URL: the sandbox has an account of its own"


def test_ports_differ() -> None:
    assert read_errors({"GATEWAY_OPS_PORT": "8080"}) == ("GATEWAY_OPS_PORT must differ from GATEWAY_PORT",)
    assert read_errors({"GATEWAY_PORT": "8082"}) == ("GATEWAY_SANDBOX_PORT must differ from GATEWAY_PORT",)
    assert read_errors({"GATEWAY_OPS_PORT": "8082"}) == ("GATEWAY_SANDBOX_PORT must differ from GATEWAY_OPS_PORT",)
    Settings.load({"GATEWAY_PORT": "0", "GATEWAY_OPS_PORT": "0", "GATEWAY_SANDBOX_PORT": "0"})
    Settings.load({"GATEWAY_HOST": "10.0.0.1", "GATEWAY_OPS_HOST": "10.0.0.2", "GATEWAY_OPS_PORT": "8080"})


def test_all_errors_are_reported() -> None:
    errors = read_errors(
        {"GATEWAY_ENV": "production", "GATEWAY_PORT": "x", "GATEWAY_REDIS_URL": "x", "GATEWAY_NAME": "x"}
    )
    assert [fault.split()[0] for fault in errors] == [
        "GATEWAY_NAME",
        "GATEWAY_PORT",
        "GATEWAY_REDIS_URL",
        "GATEWAY_UPSTREAM_URL",
        "GATEWAY_SECRET_KEYS",
        "GATEWAY_ADMIN_TOKEN",
    ]


def test_repr_hides_secrets() -> None:
    environ = PRODUCTION | {"GATEWAY_REDIS_URL": "redis://:hush@store", "GATEWAY_UPSTREAM_USER_KEY": "hush-too"}
    text = repr(Settings.load(environ))
    for secret in ("hush", PRODUCTION["GATEWAY_ADMIN_TOKEN"], repr(KEY), PRODUCTION["GATEWAY_SECRET_KEYS"]):
        assert secret not in text
    assert "redis_url='***'" in text
    assert "port=8080" in text
    assert "redis_url=None" in repr(Settings.load({}))


@given(st.text(min_size=12, alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))
def test_messages_hide_secrets(text_of_it: str) -> None:
    secret = text_of_it + "§"  # which is in no message by itself
    for name in ("GATEWAY_REDIS_URL", "GATEWAY_SECRET_KEYS", "GATEWAY_ADMIN_TOKEN", "GATEWAY_UPSTREAM_URL"):
        for text in (secret, f"redis://:{secret}@host", f"http://:{secret}@host"):
            assert secret not in error_message({name: text})


def test_settings_table() -> None:
    names = [setting.name for setting in SETTINGS]
    assert len(set(names)) == len(names)
    assert all(setting.description.endswith(".") for setting in SETTINGS)
    assert {"GATEWAY_ENV", "GATEWAY_SANDBOX_PORT"} < set(names)
