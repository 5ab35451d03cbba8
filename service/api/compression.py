"""Compression of responses by gzip: middleware of the routes whose responses may be long, so that it costs no other.

Submissions, reads of a task and streams are short or go on, and results are images. Litestar's own middleware also
sends gzip to a client that refuses it (`q=0`), compresses what is compressed, and keeps an ETag, which then names two
contents (RFC 9110, 8.8.3).

The lengths of compressed responses reveal secrets in them (BREACH) only to a page that makes a browser send requests
with the victim's credentials; a browser adds no bearer token by itself. A secret is shown only by a POST or PUT.
"""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from litestar.types import ASGIApp, Receive, Send

_LEVEL = 4
"""A tenth of the size for JSON. Higher levels take twice as long for a few percent less."""
_MIN_BYTES = 1_000
"""A shorter response fits into a packet or two anyway."""
_MAX_INLINE_BYTES = 65_536
"""Takes half a millisecond; a longer one is compressed in a thread."""
_MEDIA_TYPE = re.compile(rb"application/(?:problem\+)?json|text/")
_GZIP = re.compile(r"(?:^|,)\s*(?:x-)?gzip\s*(?!;\s*q=0(?:\.0*)?\s*(?:,|$))(?:[;,]|$)", re.IGNORECASE)
_compress = partial(gzip.compress, compresslevel=_LEVEL, mtime=0)


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether an `Accept-Encoding` header names gzip, with a quality above 0."""
    return _GZIP.search(accept_encoding) is not None


class CompressionMiddleware:
    """Compresses JSON and text in responses to GET, where the client accepts gzip."""

    def __init__(self, app: ASGIApp, compress: Callable[[bytes], bytes] = _compress) -> None:
        self._app = app
        self._compress = compress

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        encodings = [value for name, value in scope["headers"] if name == b"accept-encoding"]
        if scope["method"] != "GET" or not accepts_gzip(b",".join(encodings).decode("latin-1")):
            await self._app(scope, receive, send)
            return
        start: Any = None

        async def send_compressed(message: Any) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_compressible(message):
                start = message  # sent with the body, whose length decides
                return
            if start:
                body = message["body"]
                if not message.get("more_body") and len(body) >= _MIN_BYTES:
                    is_long = len(body) > _MAX_INLINE_BYTES
                    body = await asyncio.to_thread(self._compress, body) if is_long else self._compress(body)
                    own = {b"content-encoding": b"gzip", b"content-length": b"%d" % len(body)}
                    kept = [field for field in start["headers"] if field[0] not in own]
                    headers = [*kept, *own.items(), (b"vary", b"Accept-Encoding")]
                    start, message = {**start, "headers": headers}, {**message, "body": body}
                await send(start)
                start = None
            await send(message)

        await self._app(scope, receive, send_compressed)


def static_compression(app: ASGIApp) -> CompressionMiddleware:
    """Middleware for responses that are the same for all requests: each is compressed once, as far as possible."""
    return CompressionMiddleware(app, lru_cache(maxsize=64)(partial(gzip.compress, mtime=0)))


def _is_compressible(start: Any) -> bool:
    headers = dict(start["headers"])
    has_one_form = b"content-encoding" in headers or b"etag" in headers
    return not has_one_form and _MEDIA_TYPE.match(headers.get(b"content-type", b"")) is not None
