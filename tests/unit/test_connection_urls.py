"""Parsing and redaction of Redis URLs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from service.storage.connections import (
    Credentials,
    InvalidRedisUrl,
    RedisAddress,
    Topology,
    parse_redis_url,
    redact_url,
)

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
