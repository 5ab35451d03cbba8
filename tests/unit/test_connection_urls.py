"""Parsing and redaction of Redis URLs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.storage.connections import (
    Credentials,
    InvalidRedisUrl,
    RedisAddress,
    Topology,
    parse_redis_url,
    redact_url,
)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://store", RedisAddress(topology=Topology.SINGLE, hosts=(("store", 6379),))),
        ("redis://store:1/", RedisAddress(topology=Topology.SINGLE, hosts=(("store", 1),))),
        (
            "redis://me:p%40ss%2F@store/3",
            RedisAddress(
                topology=Topology.SINGLE,
                hosts=(("store", 6379),),
                database=3,
                credentials=Credentials("me", "p@ss/"),
            ),
        ),
        ("redis://[::1]:7", RedisAddress(topology=Topology.SINGLE, hosts=(("::1", 7),))),
        ("rediss://store", RedisAddress(topology=Topology.SINGLE, hosts=(("store", 6379),), tls_options={})),
        (
            "rediss://store?ssl_ca_certs=/ca.pem&ssl_check_hostname=false&ssl_cert_reqs=required",
            RedisAddress(
                topology=Topology.SINGLE,
                hosts=(("store", 6379),),
                tls_options={"ssl_ca_certs": "/ca.pem", "ssl_check_hostname": False, "ssl_cert_reqs": "required"},
            ),
        ),
        ("unix:///run/a%20b/s", RedisAddress(topology=Topology.SINGLE, path="/run/a b/s")),
        ("unix:///run/s?db=2", RedisAddress(topology=Topology.SINGLE, path="/run/s", database=2)),
        (
            "redis+sentinel://:pw@a,b:1/main/4?sentinel_username=u&sentinel_password=w",
            RedisAddress(
                topology=Topology.SENTINEL,
                hosts=(("a", 26379), ("b", 1)),
                sentinel_service="main",
                database=4,
                credentials=Credentials(None, "pw"),
                sentinel_credentials=Credentials("u", "w"),
            ),
        ),
        (
            "redis+sentinel://a/main?sentinel_ssl=true&ssl_ca_certs=/ca",
            RedisAddress(
                topology=Topology.SENTINEL,
                hosts=(("a", 26379),),
                sentinel_service="main",
                sentinel_tls_options={"ssl_ca_certs": "/ca"},
            ),
        ),
        (
            "rediss+sentinel://a/main?sentinel_ssl=true",
            RedisAddress(
                topology=Topology.SENTINEL,
                hosts=(("a", 26379),),
                sentinel_service="main",
                tls_options={},
                sentinel_tls_options={},
            ),
        ),
        (
            "rediss+sentinel://a/main?sentinel_ssl=false",
            RedisAddress(topology=Topology.SENTINEL, hosts=(("a", 26379),), sentinel_service="main", tls_options={}),
        ),
        (
            "rediss+cluster://a,b:1",
            RedisAddress(topology=Topology.CLUSTER, hosts=(("a", 6379), ("b", 1)), tls_options={}),
        ),
    ],
)
def test_parse_url(url: str, address: RedisAddress) -> None:
    assert parse_redis_url(url) == address


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("store:6379", "must be a URL that starts with redis://"),
        ("http://store", "must be a URL that starts with redis://"),
        ("redis://[::1", "must be a URL"),
        ("redis://store?x", "must be a URL"),
        ("redis://", "must name its hosts as host or host:port"),
        ("redis://:1", "must name its hosts as host or host:port"),
        ("redis://store:0", "must name its hosts as host or host:port"),
        ("redis://store:65536", "must name its hosts as host or host:port"),
        ("redis://a b", "must name its hosts as host or host:port"),
        ("redis+cluster://a,,b", "must name its hosts as host or host:port"),
        ("redis://a,b", "must name one host"),
        ("redis://store/x", "must name its database by a number"),
        ("redis://store/²", "must name its database by a number"),
        ("redis://store/1/2", "must have no path but"),
        ("redis+cluster://store/1", "must have no path but"),
        ("redis+sentinel://store", "must name the service"),
        ("redis+sentinel://store/main/x", "must name its database by a number"),
        ("unix://host/path", "must be like unix:///path/to/socket"),
        ("unix://", "must be like unix:///path/to/socket"),
        ("redis://store?socket_timeout=1", "must have no fragment and no options but"),
        ("redis://store?ssl_ca_certs=/ca", "must have no fragment and no options but"),
        ("redis://store#x", "must have no fragment and no options but"),
        ("rediss://store?ssl_cert_reqs=maybe", "must have none, optional or required as ssl_cert_reqs"),
        ("rediss://store?sentinel_ssl=true", "must have no fragment and no options but"),
        ("redis+sentinel://a/main?sentinel_ssl=yes", "must have true or false as sentinel_ssl"),
        ("redis+sentinel://a/main?ssl_ca_certs=/ca", "must have no fragment and no options but"),
        ("rediss://store?ssl_check_hostname=1", "must have true or false as ssl_check_hostname"),
    ],
)
def test_invalid_url(url: str, fault: str) -> None:
    with pytest.raises(InvalidRedisUrl) as caught:
        parse_redis_url(url)
    assert str(caught.value).startswith(fault)


@given(
    st.text("0123456789/@:#?%é[]", min_size=10),
    st.sampled_from(["{}", "redis://:{}@store", "redis://{}", "rediss://store?{}={}"]),
)
def test_passwords_are_never_shown(secret: str, pattern: str) -> None:
    """For any text, neither the error nor the parsed URL shows a password."""
    try:
        text = repr(parse_redis_url(f"redis://:{secret}@store").credentials)
    except InvalidRedisUrl as error:
        text = str(error)
    assert secret not in text
    try:
        parse_redis_url(pattern.format(secret, secret))
    except InvalidRedisUrl as error:
        text = str(error)
    assert secret not in text


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("redis://store", "redis://store"),
        ("rediss://me:hush@store:1/2?ssl_cert_reqs=none", "rediss://***@store:1/2?ssl_cert_reqs=none"),
        ("unix:///run/s?db=1", "unix:///run/s?db=1"),
        (
            "redis+sentinel://:hush@a,b:2/main?sentinel_username=me&sentinel_password=hush",
            "redis+sentinel://***@a,b:2/main?sentinel_username=me&sentinel_password=***",
        ),
    ],
)
def test_redaction(url: str, redacted: str) -> None:
    assert redact_url(url) == redacted
