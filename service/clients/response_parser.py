"""Parses responses leniently: the task of a response that is not understood was paid for."""

from __future__ import annotations

import h11
import httptools

MAX_BODY_BYTES = 65_536
MAX_HEAD_BYTES = 100 * 1024
_MAX_RECEIVED_BYTES = 1024 * 1024
"""Limit of a response with the framing of its chunks."""
_FRAMING_FIELDS = frozenset({b"content-length", b"transfer-encoding"})


class ResponseTooLarge(Exception):
    """The rest of the response is not read."""


class ResponseParser:
    """One response as far as it has arrived; informational ones before it are skipped.

    httptools parses it. What it refuses, such as a repeated length or odd extensions of chunks, is parsed again by h11.
    """

    status: int | None = None
    """Known once the head has arrived."""
    retry_after: str | None = None
    has_ended = False
    failure = ""
    """The type of the error for which the response may be incomplete, once it has ended.

    The error itself would refer to the frames of the request, and keep its image in memory.
    """
    is_reusable = False
    """Whether its connection may be kept, once it has ended."""

    def __init__(self) -> None:
        self.body = bytearray()
        self._received: list[bytes] = []
        self._received_size = 0
        self._has_length = False
        self._fallback: h11.Connection | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(
            lenient_headers=True,
            lenient_chunked_length=True,
            lenient_keep_alive=True,
            lenient_transfer_encoding=True,
            lenient_version=True,
            lenient_optional_lf_after_cr=True,
            lenient_optional_cr_before_lf=True,
            lenient_optional_crlf_after_chunk=True,
            lenient_spaces_after_chunk_size=True,
        )

    def feed(self, data: bytes) -> None:
        if self._parser is None:  # it has ended: bytes of no request must not become the response to the next one
            self.is_reusable = False
            return
        self._received.append(data)
        self._received_size += len(data)
        if self._fallback is not None:
            self._feed_fallback(data)
        else:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as error:
                self._end(error)
            except httptools.HttpParserError:
                self._on_refused()
        if self._received_size > (MAX_HEAD_BYTES if self.status is None else _MAX_RECEIVED_BYTES):
            self._end(ResponseTooLarge())
        if self.has_ended:
            self._parser = None  # it refers to this object

    def finish(self, error: Exception | None) -> None:
        """End the response with its connection: a body without a length is complete then."""
        is_complete = self.status is not None and not self._has_length
        self._end(error or (None if is_complete else EOFError()))
        self._parser = None

    def _end(self, error: Exception | None = None) -> None:
        if not self.has_ended:
            self.has_ended, self.failure = True, type(error).__name__ if error else ""

    def on_message_begin(self) -> None:
        if self.has_ended:
            self.is_reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in _FRAMING_FIELDS:
            self._has_length = True
        elif name == b"retry-after" and not self.has_ended:
            self.retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if not self.has_ended and self._parser is not None:
            status = self._parser.get_status_code()
            if status >= 200:
                self.status = status
            else:
                self._has_length, self.retry_after = False, None

    def on_body(self, data: bytes) -> None:
        if not self.has_ended:
            self.body += data
            if len(self.body) > MAX_BODY_BYTES:
                del self.body[MAX_BODY_BYTES:]
                self._end(ResponseTooLarge())

    def on_message_complete(self) -> None:
        if self.status is not None and not self.has_ended and self._parser is not None:
            self.is_reusable = self._parser.should_keep_alive()
            self._end()

    def _on_refused(self) -> None:
        if self.has_ended:
            self.is_reusable = False
            return
        self._fallback = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._fallback.send(h11.Request(method="POST", target="/", headers=[("Host", "upstream")]))
        self._fallback.send(h11.EndOfMessage())
        self._feed_fallback(b"".join(self._received))

    def _feed_fallback(self, data: bytes) -> None:
        assert self._fallback is not None  # noqa: S101 - for the type checker
        try:
            self._fallback.receive_data(data)
            while not self.has_ended:
                match self._fallback.next_event():
                    case h11.Response() as head:
                        self.status, self._has_length, self.retry_after = head.status_code, False, None
                        self.body.clear()
                        for name, value in head.headers:
                            self.on_header(name, value)
                    case h11.Data(data=part):
                        self.on_body(part)
                    case h11.EndOfMessage():
                        self._end()
                    case h11.InformationalResponse():
                        pass
                    case _:
                        return
        except h11.RemoteProtocolError as error:
            self._end(error)
