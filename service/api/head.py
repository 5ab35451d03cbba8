"""HEAD wherever there is GET: the same answer without its content, as RFC 9110 asks of every server."""

from __future__ import annotations

from typing import Any

from service.api.edge import App, Message

HEAD = "imaging_gateway.head"
"""Stands in the scope where only the head of the answer is wanted, so that no content need be made for it."""

_ALLOW = b"allow"


def answering_head(app: App) -> App:
    """Wrap an application that knows GET only."""

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        asked_for_head = scope["method"] == "HEAD"

        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [_with_head(*header) for header in message["headers"]]
            elif asked_for_head and message["type"] == "http.response.body":
                return
            await send(message)
            if asked_for_head:
                # At once, since what is streamed may take its time or never end.
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        # The server keeps its own scope, by which it knows that no content may follow.
        inner = {**scope, "method": "GET", HEAD: True} if asked_for_head else scope
        try:
            await app(inner, receive, pass_on)
        finally:
            if "path_template" in inner:
                scope["path_template"] = inner["path_template"]

    return answering


def _with_head(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header, and if it lists the methods allowed, with HEAD where it has GET."""
    methods = [each.strip() for each in value.split(b",")] if name.lower() == _ALLOW else []
    return (name, b", ".join([*methods, b"HEAD"])) if b"GET" in methods and b"HEAD" not in methods else (name, value)
