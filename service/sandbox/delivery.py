"""How an answer leaves the sandbox: whole, torn, as a web server's page, or not at all."""

from __future__ import annotations

import os
import re
from http.client import responses
from pathlib import Path
from typing import Final

import msgspec

from service.sandbox.asgi import JSON, Exchange
from service.sandbox.dials import Fault
from service.sandbox.wire import Answer, spoiled

_CHUNK: Final = 256 * 1024
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_CONTENT_TYPES: Final = {".png": "image/png", ".svg": "image/svg+xml"}


async def deliver(exchange: Exchange, answer: Answer, fault: Fault) -> None:
    """Send the answer of a call in the way the fault says."""
    if fault.reply in {"hang", "reset", "page"}:
        await withhold(exchange, fault)
        return
    body = msgspec.json.encode(spoiled(answer, fault.wrong))
    if fault.reply == "garbled":
        body = body[: len(body) // 2]
    await exchange.start(fault.status, JSON, len(body))
    if fault.reply == "cut":
        await exchange.write(body[: len(body) // 2], more=True)
        await _hang_up(exchange)
    else:
        await exchange.write(body)


async def withhold(exchange: Exchange, fault: Fault) -> None:
    """Do what the fault says instead of answering: hang, reset, or a page of HTML."""
    if fault.reply == "page":
        await exchange.respond(fault.status, "text/html; charset=utf-8", _page(fault.status))
        return
    if fault.reply == "reset":
        exchange.connection.reset()
    await exchange.gone()


async def deliver_file(exchange: Exchange, path: Path, fault: Fault) -> None:
    """Send a file, or the range of it that was asked for (RFC 9110, one range of bytes).

    Raises:
        OSError: the file can't be read.

    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        headers = {"accept_ranges": "bytes", "etag": f'"{path.parent.name}-{path.stem}"'}
        content_type = _CONTENT_TYPES[path.suffix]
        status, first, end = 200, 0, size
        asked = _RANGE.fullmatch(exchange.header("range"))
        if asked and exchange.method == "GET" and exchange.header("if-range") in {"", headers["etag"]}:
            first, end = _bounds(asked, size)
            if first >= end:
                await exchange.start(416, content_type, 0, content_range=f"bytes */{size}")
                await exchange.write(b"")
                return
            status = 206
            headers["content_range"] = f"bytes {first}-{end - 1}/{size}"
        await exchange.start(status, content_type, end - first, **headers)
        if exchange.method == "GET":
            file.seek(first)
            left = (end - first) // 2 if fault.reply == "cut" else end - first
            while left > 0 and (piece := file.read(min(_CHUNK, left))):
                left -= len(piece)
                await exchange.write(piece, more=True)
    if fault.reply == "cut":
        await _hang_up(exchange)
    else:
        await exchange.write(b"")


def _bounds(asked: re.Match[str], size: int) -> tuple[int, int]:
    """Give the first byte of a range and the one behind its last; they meet where no byte can be given."""
    first, last = asked.groups()
    if first:
        return int(first), min(int(last) + 1, size) if last else size
    return (max(size - int(last), 0), size) if last else (0, 0)


async def _hang_up(exchange: Exchange) -> None:
    exchange.connection.hang_up()
    await exchange.gone()


def _page(status: int) -> bytes:
    title = f"{status} {responses.get(status, 'Error')}"
    return (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n"
        f"<center><h1>{title}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
    ).encode()
