"""Settings from the environment, Redis URLs, and the checks of production."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from service.devstack import start_dev_services
from service.domain.tenants import Operator, OperatorRole
from service.production_checks import production_warnings
from service.setting_types import LogLevel, Role, Switch
from service.settings import Settings, SettingsError
from service.storage.connections import (
    Credentials,
    InvalidRedisUrl,
    RedisAddress,
    Topology,
    parse_redis_url,
    redact_url,
)

KEY = sha256(b"random").digest()
TOKEN = "3f8a1c5e9b7d2046f1e3a5c7d9b80246"
HASH = bytes(range(32)).hex()
PRODUCTION = {
    "GATEWAY_ENV": "production",
    "GATEWAY_REDIS_URL": "redis://store",
    "GATEWAY_UPSTREAM_URL": "https://images.example",
    "GATEWAY_SECRET_KEYS": base64.b64encode(KEY).decode(),
    "GATEWAY_ADMIN_TOKEN": TOKEN,
}


def find_errors(environ: Mapping[str, str]) -> tuple[str, ...]:
    try:
        Settings.load(environ)
    except SettingsError as error:
        return error.errors
    return ()


def find_invalid(**settings: str) -> list[str]:
    """Return the settings that an error is about, out of settings without their prefix."""
    errors = find_errors({f"GATEWAY_{name}": text for name, text in settings.items()})
    return [error.split()[0].removeprefix("GATEWAY_") for error in errors]


def test_defaults() -> None:
    settings = Settings.load({"HOME": "/somewhere"})
    assert not settings.is_production
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert (settings.ops_host, settings.ops_port) == ("127.0.0.1", 8081)
    assert (settings.redis_url, settings.upstream_url, settings.admin_token, settings.secret_keys) == (*[None] * 3, ())
    assert settings.catalogue.vendor_word("model", "general") == "通用模型"
    assert Settings.load({"GATEWAY_HOST": "0.0.0.0"}).ops_host == "0.0.0.0"
    assert (settings.playground, Settings.load(PRODUCTION).playground) == (Switch.ON, Switch.OFF)
    assert Settings.load(PRODUCTION | {"GATEWAY_PLAYGROUND": "on"}).playground is Switch.ON


def test_given_values() -> None:
    settings = Settings.load(
        PRODUCTION
        | {
            "GATEWAY_HOST": "::",
            "GATEWAY_PORT": "80",
            "GATEWAY_OPS_HOST": "10.0.0.1",
            "GATEWAY_UPSTREAM_URL": "https://images.example/",
            "GATEWAY_POLL_SECONDS": "0.5",
            "GATEWAY_ROLE": "worker",
            "GATEWAY_MODELS": "general=通用模型, anime=动漫",
            "GATEWAY_LOG_LEVEL": "warning",
            "GATEWAY_MAX_IMAGE_BYTES": "5 MiB",
            "GATEWAY_SECRET_KEYS": f"{base64.b64encode(KEY).decode()},\n{base64.urlsafe_b64encode(KEY).decode()}",
        }
    )
    assert settings.is_production
    assert (settings.host, settings.port, settings.ops_host) == ("::", 80, "10.0.0.1")
    assert settings.upstream_url == "https://images.example"
    assert (settings.secret_keys, settings.admin_token) == ((KEY, KEY), None)  # a worker has none
    assert Settings.load(PRODUCTION).admin_token == TOKEN
    assert find_errors(PRODUCTION | {"GATEWAY_ROLE": "worker", "GATEWAY_ADMIN_TOKEN": ""}) == ()
    assert (settings.poll_seconds, settings.role, settings.log_level) == (0.5, Role.WORKER, LogLevel.WARNING)
    assert settings.models == {"general": "通用模型", "anime": "动漫"}
    assert settings.max_image_bytes == 5 << 20


def test_values_from_files(tmp_path: Path) -> None:
    contents = {"token": b"  from-a-file\n", "empty": b"\n", "bytes": b"\xff\xfe", "large": b"x" * 70_000}
    paths = {name: str(tmp_path / name) for name in (*contents, "missing")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    settings = Settings.load(
        {
            "GATEWAY_ADMIN_TOKEN_FILE": paths["token"],
            "GATEWAY_ADMIN_TOKEN": "",
            "GATEWAY_PORT": "",
            "GATEWAY_OPS_PORT_FILE": paths["empty"],
        }
    )
    assert (settings.admin_token, settings.port, settings.ops_port) == ("from-a-file", 8080, 8081)
    wrong = {"HOST": "missing", "PORT": "token", "KEY_PREFIX": "bytes", "MODELS": "large"}
    assert find_invalid(PORT="1", **{f"{name}_FILE": paths[file] for name, file in wrong.items()}) == list(wrong)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("ENV", ["staging"]),
        ("PORT", ["65536", "٣", "-1"]),
        ("DATA_DIR", ["a\0b"]),
        ("KEY_PREFIX", ["a{b}", "x" * 33]),
        ("UPSTREAM_URL", ["ftp://x", "http://", "http://host:port"]),
        ("UPSTREAM_URL", ["http://me:secret@x", "http://x?y=z", "http://2852039166", "https://[fd00:ec2::254]"]),
        ("ADMIN_TOKEN", ["schlüssel", "a\nb"]),
        ("OPERATORS", ["alice", f"alice:owner:{HASH}", f"alice:admin:{HASH[1:]}", f"Alice:admin:{HASH}"]),
        ("OPERATORS", [f"admin:admin:{HASH}", f"alice:admin:{HASH},", f"alice:admin:{HASH},bob:read-only:{HASH}"]),
        ("TRUSTED_PROXIES", ["proxy.internal", "10.0.0.1/8", "10.0.0.0/8,", "0.0.0.0/0", "fd00::/8,::/0"]),
        ("PRIVATE_DOMAINS", [",", ".example", "a b", "http://a"]),
        ("SECRET_KEYS", ["a?b", "c2hvcnQ=", f"{base64.b64encode(KEY).decode()},c2hvcnQ="]),
        ("MAX_IMAGE_BYTES", ["1023", "a lot", "1025 MiB"]),
        ("POLL_SECONDS", ["nan", "soon", "0.04"]),
        ("LEASE_SECONDS", ["60"]),
        ("MODELS", ["anime=动漫"]),
        ("PLAYGROUND", ["true", "ON"]),
        ("STYLES", ["general=a,general=b", "general"]),
    ],
)
def test_invalid_values(name: str, texts: list[str]) -> None:
    for text in texts:
        assert find_invalid(**{name: text}) == [name], text


def test_unknown_variables() -> None:
    environ = {"GATEWAY_PROT": "1", "GATEWAY_REDIS_ULR_FILE": "x", "GATEWAY_ZZZ": "", "PATH": "/bin"}
    errors = find_errors(environ | {"GATEWAY_PORT_8080_TCP": "tcp://10.0.0.1:8080"})
    for error, hint in zip(errors, ("enableServiceLinks", "GATEWAY_PORT?", "GATEWAY_REDIS_URL_FILE?", ""), strict=True):
        assert hint in error


@pytest.mark.parametrize(
    ("settings", "invalid"),
    [
        ({"ROLE": "api"}, ["ROLE=api"]),
        ({"UPSTREAM_USER_KEY": "mine"}, ["UPSTREAM_USER_KEY"]),
        ({"OPS_PORT": "8080"}, ["OPS_PORT"]),
        ({"PORT": "8082"}, []),
        ({"PORT": "0", "OPS_PORT": "0", "SANDBOX_PORT": "0"}, []),
        ({"HOST": "10.0.0.1", "OPS_HOST": "10.0.0.2", "OPS_PORT": "8080"}, []),
        (
            {"ENV": "production", "PORT": "x", "REDIS_URL": "x", "NAME": "x"},
            ["NAME", "PORT", "REDIS_URL", "UPSTREAM_URL", "SECRET_KEYS", "ADMIN_TOKEN"],
        ),
    ],
)
def test_conflicts(settings: Mapping[str, str], invalid: list[str]) -> None:
    assert find_invalid(**settings) == invalid


async def test_operators(tmp_path: Path) -> None:
    """Production needs an operator that can make changes, and no other token is generated then."""
    bare = PRODUCTION | {"GATEWAY_ADMIN_TOKEN": "", "GATEWAY_DATA_DIR": str(tmp_path / "data")}
    reader, admin = f"bob:read-only:{HASH}", f"alice:admin:{HASH[::-1].upper()}"
    (error,) = find_errors(bare | {"GATEWAY_OPERATORS": reader})
    assert error.startswith("GATEWAY_ADMIN_TOKEN ")
    settings = Settings.load(bare | {"GATEWAY_OPERATORS": f"{reader}, {admin}"})
    assert settings.all_operators == (
        Operator("bob", OperatorRole.READ_ONLY, bytes.fromhex(HASH)),
        Operator("alice", OperatorRole.ADMIN, bytes.fromhex(HASH[::-1])),
    )
    async with start_dev_services(settings) as complete:
        assert complete.all_operators == settings.all_operators
    assert not (tmp_path / "data").exists()


WEAK_KEYS = [bytes(32), b"s" * 32, bytes(range(150, 158)) * 4, b"correct horse battery staple 123", bytes(range(32))]
WEAK_TOKENS = ["t" * 40, "changeme" * 4, "abcde" * 8 + "abc", "0123456789abcdef" * 2, "hush!!" * 6, "0123456789" * 9]
WEAK_TOKENS += [
    "replace-me-with-32-random-characters",
    "Imaging-Gateway-Production-Token-1",
    "SuperSecretPassword1234567890!!!",
]
WEAK_TOKENS += ["qwertyuiopasdfghjklzxcvbnm1234567890", "deadbeefdeadbeefcafebabecafebabe"]
STRONG_TOKENS = [KEY.hex(), KEY.hex()[:32], base64.b64encode(KEY).decode(), KEY.hex() * 2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("ADMIN_TOKEN", token) for token in (TOKEN[:31], *WEAK_TOKENS)),
        ("METRICS_TOKEN", WEAK_TOKENS[0]),
        *(("SECRET_KEYS", base64.b64encode(key).decode()) for key in WEAK_KEYS),
        ("SECRET_KEYS", f"{PRODUCTION['GATEWAY_SECRET_KEYS']},{base64.b64encode(WEAK_KEYS[1]).decode()}"),
        *(("UPSTREAM_URL", f"http://{host}") for host in ("images.example/api", "8.8.8.8", "[2606:4700::1111]:80")),
        *(
            ("UPSTREAM_URL", f"http://{host}")
            for host in ("134744072", "0x8.010.0x808", "8.8.8.8.", "[::ffff:8.8.8.8]")
        ),
        *(("UPSTREAM_URL", f"http://{host}") for host in ("[64:ff9b::808:808]", "[2002:808:808::1]")),
        ("REDIS_URL", "redis://:hush@8.8.8.8"),
        ("REDIS_URL", "rediss://8.8.8.8"),
        ("REDIS_URL", "redis://8.8.8.8"),  # both TLS and a password are missing
    ],
)
def test_production_refuses_weak_settings(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "value").write_text(text)
    for given_as in (
        {f"GATEWAY_{name}": text},
        {f"GATEWAY_{name}": "", f"GATEWAY_{name}_FILE": str(tmp_path / "value")},
    ):
        errors = find_errors(PRODUCTION | given_as)
        assert [error.split()[0] for error in errors] == [f"GATEWAY_{name}"] * (2 if "redis://8" in text else 1)
        assert not any(secret in str(errors) for secret in (text, "hush", text.partition(",")[2] or text))
        assert find_errors(PRODUCTION | given_as | {"GATEWAY_ENV": "development"}) == ()


def test_random_secrets_are_accepted() -> None:
    for number in range(100):
        key = sha256(bytes([number])).digest()
        secrets = {"GATEWAY_SECRET_KEYS": base64.b64encode(key).decode(), "GATEWAY_ADMIN_TOKEN": key.hex()[:32]}
        assert find_errors(PRODUCTION | secrets) == ()
    for token in STRONG_TOKENS:
        assert find_errors(PRODUCTION | {"GATEWAY_ADMIN_TOKEN": token}) == ()


@pytest.mark.parametrize(
    ("name", "text", "warnings"),
    [
        # It may be an egress proxy.
        *(
            ("UPSTREAM_URL", f"http://{host}", 0)
            for host in ("localhost:1", "10.1.2.3", "[fd00::1]", "egress.shop.svc", "2130706433", "[::ffff:10.1.2.3]")
        ),
        ("UPSTREAM_URL", "http://images.example", 1),
        *(("REDIS_URL", url, 0) for url in ("redis://10.0.0.1", "unix:///run/store.sock", "rediss://:word@8.8.8.8")),
        ("REDIS_URL", "redis://store.example", 2),  # its address may be private
        ("REDIS_URL", "rediss://:word@store.example?ssl_cert_reqs=none", 1),
        ("LOG_LEVEL", "debug", 1),
        *(("TRACES_URL", f"http://{host}:4318", 0) for host in ("collector", "10.1.2.3", "otel.svc")),
        ("TRACES_URL", "https://collector.example", 0),
        ("TRACES_URL", "http://collector.example:4318", 1),
    ],
)
def test_production_warnings(name: str, text: str, warnings: int) -> None:
    environ = PRODUCTION | {f"GATEWAY_{name}": text}
    if name == "UPSTREAM_URL" and warnings:
        environ["GATEWAY_UPSTREAM_CLEARTEXT"] = "allow"
    loaded = Settings.load(environ)
    assert [field for field, _ in production_warnings(vars(loaded))] == [name.lower()] * warnings


@pytest.mark.parametrize(
    ("host", "ops_host", "warned"),
    [
        ("0.0.0.0", "", ["ops_host", "host"]),
        ("::", "0.0.0.0", ["ops_host", "host"]),
        ("0.0.0.0", "127.0.0.1", ["host"]),
        ("127.0.0.1", "10.0.0.1", ["ops_host"]),
        ("localhost", "::1", []),
    ],
)
def test_warnings_of_open_ports(host: str, ops_host: str, warned: list[str]) -> None:
    settings = Settings.load(PRODUCTION | {"GATEWAY_HOST": host, "GATEWAY_OPS_HOST": ops_host})
    assert [field for field, _ in production_warnings(vars(settings))] == warned
    assert list(production_warnings(vars(settings) | {"role": Role.WORKER})) == []  # it takes no tokens
    proxied = [field for field, _ in production_warnings(vars(settings) | {"trusted_proxies": ("10.0.0.0/8",)})]
    assert proxied == warned[:-1]


def test_private_domains() -> None:
    """A host in one of these domains, and no other, counts as private."""
    environ = PRODUCTION | {"GATEWAY_PRIVATE_DOMAINS": "corp.example, Internal"}
    for host, is_private in (("corp.example", 1), ("a.CORP.example.", 1), ("evilcorp.example", 0), ("a.local", 0)):
        assert (find_errors(environ | {"GATEWAY_UPSTREAM_URL": f"http://{host}"}) == ()) == is_private, host


def test_repr_hides_secrets() -> None:
    environ = PRODUCTION | {"GATEWAY_REDIS_URL": "redis://:hush@store", "GATEWAY_UPSTREAM_USER_KEY": "hush-too"}
    text = repr(Settings.load(environ))
    for secret in ("hush", TOKEN, repr(KEY), PRODUCTION["GATEWAY_SECRET_KEYS"]):
        assert secret not in text
    assert "port=8080" in text


@given(st.text(min_size=12, alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))
def test_errors_hide_secrets(secret: str) -> None:
    secret += "§"  # which is in no error by itself
    for name in ("GATEWAY_REDIS_URL", "GATEWAY_SECRET_KEYS", "GATEWAY_ADMIN_TOKEN", "GATEWAY_UPSTREAM_URL"):
        for text in (secret, f"redis://:{secret}@host", f"http://:{secret}@host"):
            assert secret not in "".join(find_errors({name: text}))


SINGLE = RedisAddress(topology=Topology.SINGLE, hosts=(("store", 6379),))
SENTINEL = RedisAddress(topology=Topology.SENTINEL, hosts=(("a", 26379),), sentinel_service="main")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://store", SINGLE),
        ("redis://me:p%40ss%2F@store/3", replace(SINGLE, database=3, credentials=Credentials("me", "p@ss/"))),
        ("redis://[::1]:7", replace(SINGLE, hosts=(("::1", 7),))),
        (
            "rediss://store?ssl_ca_certs=/ca.pem&ssl_check_hostname=false&ssl_cert_reqs=required",
            replace(
                SINGLE,
                tls_options={"ssl_ca_certs": "/ca.pem", "ssl_check_hostname": False, "ssl_cert_reqs": "required"},
            ),
        ),
        ("unix:///run/a%20b/s?db=2", RedisAddress(topology=Topology.SINGLE, path="/run/a b/s", database=2)),
        (
            "redis+sentinel://:pw@a,b:1/main/4?sentinel_username=u&sentinel_password=w",
            replace(
                SENTINEL,
                hosts=(("a", 26379), ("b", 1)),
                database=4,
                credentials=Credentials(None, "pw"),
                sentinel_credentials=Credentials("u", "w"),
            ),
        ),
        (
            "redis+sentinel://a/main?sentinel_ssl=true&ssl_ca_certs=/ca",
            replace(SENTINEL, sentinel_tls_options={"ssl_ca_certs": "/ca"}),
        ),
        ("rediss+sentinel://a/main?sentinel_ssl=false", replace(SENTINEL, tls_options={})),
        (
            "rediss+cluster://a,b:1",
            RedisAddress(topology=Topology.CLUSTER, hosts=(("a", 6379), ("b", 1)), tls_options={}),
        ),
    ],
)
def test_parse_url(url: str, address: RedisAddress) -> None:
    assert parse_redis_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        *("store:6379", "http://store", "redis://[::1", "redis://store?x", "redis://", "redis://:1", "redis://store:0"),
        *("redis://store:65536", "redis+cluster://a,,b", "redis://a,b", "redis://store/x", "redis+cluster://store/1"),
        *("redis+sentinel://store", "redis+sentinel://store/main/x", "unix://host/path", "unix://"),
        *("redis://store?socket_timeout=1", "redis://store?ssl_ca_certs=/ca", "rediss://store?ssl_cert_reqs=maybe"),
        *("redis://store#x", "rediss://store?sentinel_ssl=true", "redis+sentinel://a/main?ssl_ca_certs=/ca"),
    ],
)
def test_invalid_url(url: str) -> None:
    with pytest.raises(InvalidRedisUrl):
        parse_redis_url(url)


@given(
    st.text("0123456789/@:#?%é[]", min_size=10),
    st.sampled_from(["redis://:{}@store", "{}", "redis://{}", "rediss://store?{}={}"]),
)
def test_passwords_are_never_shown(secret: str, pattern: str) -> None:
    try:
        text = repr(parse_redis_url(pattern.format(secret, secret)).credentials)
    except InvalidRedisUrl as error:
        text = str(error)
    assert secret not in text


def test_redaction() -> None:
    query = "?ssl_cert_reqs=none&sentinel_username=me&sentinel_password="
    redacted = redact_url(f"rediss+sentinel://me:hush@a,b:2/main{query}hush")
    assert redacted == f"rediss+sentinel://***@a,b:2/main{query}***"
