"""Send many requests at the same moment.

HTTP clients queue for connections and take more time than the gateways. Here every request has an open connection of
its own, and all are sent before the first response is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus

import httpx2

TIMEOUT_SECONDS = 60.0


async def send_concurrently(requests: Sequence[httpx2.Request]) -> list[httpx2.Response]:
    """Send all requests at once; returns the responses in the same order."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        streams = await asyncio.gather(
            *(asyncio.open_connection(request.url.host, request.url.port) for request in requests)
        )
        for (_, writer), request in zip(streams, requests, strict=True):
            writer.write(_encode_request(request))
        try:
            return await asyncio.gather(*(_read_response(reader) for reader, _ in streams))
        finally:
            for _, writer in streams:
                writer.close()


def _encode_request(request: httpx2.Request) -> bytes:
    """Encode a request with `Connection: close`, so that the response ends with the connection."""
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % pair for pair in request.headers.raw if pair[0].lower() != b"connection"]
    return b"\r\n".join([*lines, b"Connection: close", b"", request.read()])


async def _read_response(reader: asyncio.StreamReader) -> httpx2.Response:
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    status = HTTPStatus(int(first.split()[1]))
    headers = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
    return httpx2.Response(status, headers=headers, content=body)
