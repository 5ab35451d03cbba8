"""Responses that no two parsers read alike: the task in one is found if any parser would find it."""

from __future__ import annotations

import pytest

from service.clients.response_parser import MAX_BODY_BYTES, MAX_HEAD_BYTES, ResponseParser

BODY = b'{"err_code": 0, "task_id": "t-1"}'
OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
REST = LENGTH + b"\r\n" + BODY
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)
CHUNKS = b"\r\n" + CHUNK + b"0\r\n\r\n"


def chunk_after(size_line: bytes) -> bytes:
    return OK + CHUNKED + b"\r\n" + size_line % len(BODY) + BODY + b"\r\n0\r\n\r\n"


READABLE = [
    *(OK + REST, (OK + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY, OK + LENGTH + b"\n" + BODY),
    *(b"HTTP/1.1 200\r\n" + REST, b"HTTP/1.1 200 \r\n" + REST, "HTTP/1.1 200 成功\r\n".encode("gbk") + REST),
    *(b"HTTP/1.1 200 a\x01b\r\n" + REST, b"HTTP/1.2 200 OK\r\n" + REST, b"HTTP/2.0 200 OK\r\n" + REST),
    *(b"HTTP/1.0 200 OK\r\n\r\n" + BODY, OK + b"\r\n" + BODY, OK + b"Connection: keep-alive\r\n\r\n" + BODY),
    *(OK + CHUNKED + CHUNKS, OK + CHUNKED.upper() + CHUNKS, OK + CHUNKED + b"\r\n" + CHUNK),
    *map(chunk_after, (b"%x;a=b\r\n", b'%x; a="b c"\r\n', b"%x;=\x80 ,\r\n", b"%x  \r\n", b"%x\t\r\n", b"0000%X\r\n")),
    *(OK + CHUNKED + b"\r\n" + CHUNK + end for end in (b"zz\r\n", b"0\r\nx\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\n")),
    *(OK + CHUNKED + b"\r\n" + b"f" * digits + b"\r\n" + BODY for digits in (9, 17)),
    *(OK + CHUNKED + LENGTH + CHUNKS, OK + LENGTH + CHUNKED + CHUNKS, b"HTTP/1.0 200 OK\r\n" + CHUNKED + CHUNKS),
    *(OK + CHUNKED + CHUNKED + CHUNKS, OK + b"Transfer-Encoding: gzip, chunked\r\n" + CHUNKS),
    *(OK + LENGTH + REST, OK + LENGTH[:-2] + b", %d\r\n\r\n" % len(BODY) + BODY),
    *(
        OK + b"Content-Length: %s\r\n\r\n" % length + BODY
        for length in (b"00033", b"  33 ", b"\t33\t", b"36", b"9" * 18)
    ),
    *(OK + REST + b"more", OK + b"Connection: close\r\n" + REST + b"more", (OK + REST) * 2, OK + REST + b"\r\n\r\n"),
    *(b"HTTP/1.1 100 Continue\r\n" + fields + b"\r\n" + OK + REST for fields in (b"", b"Connection: close\r\n")),
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 3 + OK + CHUNKED + CHUNKS,
    OK + b"Upgrade: h2,h2c\r\nConnection: Upgrade\r\n" + REST,
    *(OK + field + b"\r\n" + REST for field in (b"X: a\r\n b", b"X: a\r\n\tb", b"X_y.z!#$%&'*+^`|~: y", b"X:")),
    *(
        OK + b"X: " + value + b"\r\n" + REST
        for value in ("成功".encode("gbk"), b"a\x01\x7f", b"a\x00\x0cb", b"y" * 60_000)
    ),
    *(OK + b"X: y\r\n" * 2_000 + REST, OK + b"Connection:\r\n" + REST),
]
UNREADABLE = [
    *(OK + b"Content-Length: %s\r\n\r\n" % length + BODY for length in (b"-1", b"x", b"+33", b"33.0", b"33, 9")),
    *(OK + b"Content-Length: 9\r\n" + REST, b"<html>", b"SSH-2.0-x\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x28", b""),
    *(b"HTTP/1.1 2xx OK\r\n" + REST, b"HTTP/1.1 101 Up\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + OK + REST),
    *(b"HTTP/1.1 99 OK\r\n" + REST, OK[:9], OK + LENGTH, OK + b"nonsense\r\n" + REST, OK + b"X : y\r\n" + REST),
]


def parse(data: bytes, piece_bytes: int = 100_000) -> ResponseParser:
    """Return the response of a connection that ends after the data."""
    response = ResponseParser()
    for begin in range(0, len(data), piece_bytes):
        response.feed(data[begin : begin + piece_bytes])
    response.finish(None)
    return response


@pytest.mark.parametrize("piece_bytes", [100_000, 7, 1])
def test_odd_responses(piece_bytes: int) -> None:
    for data in READABLE:
        response = parse(data, piece_bytes)
        assert (response.status, bytes(response.body)) == (200, BODY), data[:200]
    for data in UNREADABLE:
        response = parse(data, piece_bytes)
        assert (response.status, bool(response.failure)) == (None, True), data[:200]


@pytest.mark.parametrize("status", [204, 304])
def test_responses_without_a_body(status: int) -> None:
    response = parse(b"HTTP/1.1 %d x\r\n" % status + REST)
    assert (response.status, bytes(response.body), response.failure) == (status, b"", "")


def test_only_a_complete_response_without_further_bytes_leaves_its_connection_usable() -> None:
    for data in (OK + REST, OK + CHUNKED + CHUNKS, b"HTTP/1.1 103 x\r\n\r\n" + OK + REST):
        response = parse(data)
        assert (response.is_reusable, response.failure) == (True, "")
        response.feed(b"x")
        assert not response.is_reusable
    close = b"Connection: close\r\n"
    for data in (
        OK + close + REST,
        b"HTTP/1.0 200 OK\r\n" + REST,
        OK + REST + b"x",
        (OK + REST) * 2,
        OK + LENGTH + REST,
    ):
        assert not parse(data).is_reusable
        assert not parse(data, 1).is_reusable


def test_what_is_read_is_limited() -> None:
    field, chunk = b"X: " + b"y" * 999 + b"\r\n", b"1;%s\r\nz\r\n" % (b"x" * 999)
    assert parse(OK + field * (MAX_HEAD_BYTES // 1_000 + 1), 1_000).failure
    assert parse(OK + field * (MAX_HEAD_BYTES // 1_000 + 1) + REST, 1_000).status is None
    for data in (OK + b"\r\n" + b"z" * (MAX_BODY_BYTES + 1), OK + CHUNKED + b"\r\n" + chunk * MAX_BODY_BYTES):
        response = parse(data, 10_000)
        assert response.status == 200
        assert response.failure
        assert 1_000 < len(response.body) <= MAX_BODY_BYTES
