"""Fetching of results: whole files of the right type or none, resumed where a connection broke."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import httpx2
from msgspec import Struct

from service.client.calls import Call, Request, Retries
from service.client.errors import NoResult, TaskFailed, UnexpectedResponse
from service.client.models import Artifact, Task

_STATUS_PARTIAL = 206
_SVG = "image/svg+xml"
EXTENSIONS: Mapping[str, str] = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", _SVG: "svg"}
"""File extensions of the types that results have."""
_SIGNATURES: Mapping[str, bytes] = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/webp": b"RIFF",
}
_HEAD_BYTES = 64
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,15})-[0-9]{1,15}/([0-9]{1,15})")


class Content(Struct, frozen=True):
    """A result in memory; the type is as the response labels it, without parameters."""

    content: bytes
    media_type: str


class SavedFile(Struct, frozen=True):
    """A result that was written."""

    path: Path
    media_type: str
    size: int


class _FileReceiver:
    """Writes a body into a file, over several responses if need be."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._etag = ""
        self._total: int | None = None
        self.media_type = ""
        self.size = 0

    def make_request(self, path: str) -> Request:
        """Request all, or the rest if the version is known."""
        headers = {"Accept-Encoding": "identity"}
        if self.size and self._etag:
            headers |= {"Range": f"bytes={self._resume_at}-", "If-Range": self._etag}
        return Request("GET", path, headers=headers, receiver=self)

    @property
    def _resume_at(self) -> int:
        # The last byte is requested again: beyond that of a whole result, nothing could be.
        return max(self.size - 1, 0)

    def begin(self, response: httpx2.Response) -> None:
        is_rest = response.status_code == _STATUS_PARTIAL
        if is_rest:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if not found or int(found[1]) != self._resume_at:
                raise UnexpectedResponse("The response is another part than was requested", response.status_code)
            self._total = int(found[2])
            self.size = self._file.seek(self._resume_at)
        else:
            self._total = None
            self._file.seek(0)
            self._file.truncate()
            self.size = 0
        etag = response.headers.get("etag", "")
        self._etag = "" if etag.startswith("W/") else etag
        self.media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()

    def check_size(self) -> None:
        """Raise UnexpectedResponse for a part, which a server may send in place of the rest."""
        if self._total not in {None, self.size}:
            raise UnexpectedResponse(f"Only {self.size} of {self._total} bytes came", _STATUS_PARTIAL)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.size += len(chunk)


def fetch_artifact(retries: Retries, artifact: Artifact) -> Call[Content]:
    file = BytesIO()
    receiver = _FileReceiver(file)
    yield from retries.exchange(lambda: receiver.make_request(artifact.href))
    receiver.check_size()
    return Content(file.getvalue(), receiver.media_type)


def download(retries: Retries, task: Task, path: str | os.PathLike[str], name: str | None) -> Call[SavedFile]:
    """Write a result to `path`, which is replaced when all of it has come. Raises OSError and GatewayError.

    A device, a pipe or a link is not replaced: the result is written into it.
    """
    artifact = find_artifact(task, name)
    target = Path(path)
    if target.is_symlink() or is_special(target):
        with TemporaryFile() as file:
            receiver = yield from _receive(retries, artifact, file)
            file.seek(0)
            with target.open("wb") as opened:
                shutil.copyfileobj(file, opened)
        return SavedFile(target, receiver.media_type, receiver.size)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb+") as file:
            receiver = yield from _receive(retries, artifact, file)
        partial.replace(target)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    return SavedFile(target, receiver.media_type, receiver.size)


def is_special(path: Path) -> bool:
    """Return whether a path is a device, a pipe or the like: neither a file nor a folder, nor missing."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _receive(retries: Retries, artifact: Artifact, file: BinaryIO) -> Call[_FileReceiver]:
    receiver = _FileReceiver(file)
    yield from retries.exchange(lambda: receiver.make_request(artifact.href))
    receiver.check_size()
    file.seek(0)
    _check_type(artifact, receiver, file.read(_HEAD_BYTES))
    return receiver


def find_artifact(task: Task, name: str | None) -> Artifact:
    """Return a result of a task. Raises TaskFailed and NoResult."""
    if task.state == "failed":
        raise TaskFailed(task)
    artifact = task.find_artifact(name)
    if artifact is None:
        names = ", ".join(item.name for item in task.artifacts) or f"none, it is {task.state}"
        raise NoResult(f"{task.id} has no result {name or ''}: it has {names}")
    return artifact


def _check_type(artifact: Artifact, receiver: _FileReceiver, head: bytes) -> None:
    """Raise UnexpectedResponse unless the bytes are what the response and the name promise."""
    media_type = receiver.media_type
    is_drawing = media_type == _SVG
    has_signature = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<" if is_drawing else False
    if signature := _SIGNATURES.get(media_type):
        has_signature = head.startswith(signature)
    if not has_signature or is_drawing != (artifact.name == "vector"):
        label = media_type or "of no type"
        raise UnexpectedResponse(f"The result {artifact.name} is no such image: {receiver.size} bytes, {label}", 200)
