"""The vendor's wire: form fields out, answers in, its words into the gateway's.

Answers are read leniently, since a type that is slightly wrong must neither lose a task that was paid for nor be taken
for a figure. Nothing here raises for anything that an answer holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from enum import Enum
from http import HTTPStatus
from itertools import chain, islice
from typing import Any
from urllib.parse import urljoin, urlsplit

import msgspec

from service.clients.decoder import decode_object
from service.clients.words import is_unknown_task, plain, public, refusal
from service.domain.ledger import Figures
from service.domain.tasks import Artifact, ArtifactName, Catalogue, Kind, Options, TaskError
from service.usecases.ports import Answered, Check, SubmitOutcome, Submitted

SUBMIT_PATHS: Mapping[Kind, str] = {
    Kind.UPSCALE: "/api/submit_task",
    Kind.VECTORIZE: "/api/submit_vector_task",
    Kind.FACE_ENHANCE: "/api/submit_face_enhance_task",
    Kind.SEAMLESS: "/api/submit_seamless_task",
}
CHECK_PATH = "/api/check_task_status"
USER_KEY = "user_key"
IMAGE = "input_image"
TASK_ID = "task_id"

_FIELDS: Mapping[str, str] = {
    "model": "sdxl_model_dropdown",
    "style": "style_dropdown",
    "scale": "upscale",
    "noise": "s_noise",
    "steps": "steps",
    "high_fidelity": "high_fidelity",
    "strong_inpaint": "strong_inpaint",
    "inpaint_strength": "strong_inpaint_intensity",
    "prompt": "prompt",
    "negative_prompt": "neg_prompt",
    "vector": "vector_switch",
    "colors": "color_count",
    "fit": "fit",
}
_RESULTS: Mapping[str, ArtifactName] = {
    "images_url": ArtifactName.IMAGE,
    "vector_url": ArtifactName.VECTOR,
    "grid_url": ArtifactName.GRID,
}

_LONGEST_ID = 256
_LONGEST_URL = 2_048
_LARGEST_FIGURE = 2**53
_NUMBER = re.compile(r"\d{1,20}(\.\d{1,20})?", re.ASCII)
_MOST_LINKS = 100
_DEEPEST_LINK = 4
_BETWEEN_LINKS = re.compile(r"[,;\s]+(?=https?://)", re.IGNORECASE)
_LINK_KEY = re.compile("url|uri|href|link|src|path", re.IGNORECASE)
_LINE_BREAKS = re.compile(r"[\t\r\n]+")
_COMPLETE = re.compile(r"\s*(?:https?:)?[/\\]{2}[^/\\]", re.IGNORECASE)
_RELATIVE = re.compile(r"\.{0,2}[/\\][^/\\]|[^?#:]*\.\w{2,5}(?:[?#]|$)|[^\s?#:/\\]{2,}[/\\][^\s?#]")
"""A path, or the name of a file; but neither a sentence nor a word that stands for nothing."""
_REPLACED = "\ufffd"
"""Stands where a byte could not be decoded."""
_WRONG_ADDRESS = frozenset({301, 302, 307, 308})
"""Redirects that mean that the service is elsewhere."""


def to_fields(options: Options, catalogue: Catalogue) -> Mapping[str, str]:
    """The form fields of a submit, without the key and the image."""
    fields = {}
    for option, value in msgspec.structs.asdict(options).items():
        if option in {"model", "style"}:
            text = catalogue.word(option, value)
        elif isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, float):
            text = format(Decimal(repr(value)), "f")
        else:
            text = str(value)
        fields[_FIELDS[option]] = text
    return fields


Report = Callable[[str, object], None]
"""Is called with the name and the value of a field that can't be used."""


def _ignore(_field: str, _value: object) -> None:
    pass


class _Said(Enum):
    """What `err_code` says, if anything."""

    SUCCESS = 0
    ERROR = 1
    NOTHING = 2


def read_submit(body: bytes, status: int = 200, retry_after: float | None = None) -> Submitted:
    """Return the outcome of a submit from its response.

    A body that declares success and names a task is an acceptance, whatever its status. Otherwise a status that is no
    success decides: 4xx is a refusal, with the vendor's message if the body holds one, and so is a redirect to where
    the service is; of any other, as of a body without an object, the outcome is unknown.
    """
    answer = decode_object(body)
    if 200 <= status < 300 or _declares_task(answer):
        return _read_submit(answer)
    if status in _WRONG_ADDRESS:
        return Submitted(outcome=SubmitOutcome.REDIRECTED)
    if not 400 <= status < 500:
        return Submitted(outcome=SubmitOutcome.UNKNOWN)
    message = plain(answer.get("err_msg"))
    refused = refusal(message) if message else Submitted(outcome=SubmitOutcome.REJECTED)
    if refused.outcome is not SubmitOutcome.REJECTED:
        return refused
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return Submitted(outcome=SubmitOutcome.BUSY, retry_after=retry_after)
    return Submitted(outcome=SubmitOutcome.REJECTED, reason=refused.reason or f"HTTP {status}")


def _read_submit(answer: Mapping[str, Any]) -> Submitted:
    """Return the outcome of a submit from a response with a status of success.

    `err_code` and the rest may contradict each other. A task id is believed unless an error was declared, since it is
    all that is left of a task that was paid for. A declared error is believed, and costs nothing, unless a task id
    stands beside it: then the task may have been accepted, whatever the message says. So may what remains: unknown.
    """
    said = _said(answer.get("err_code"))
    upstream_id = _identifier(answer.get("task_id"))
    message = plain(answer.get("err_msg"))
    if upstream_id and said is _Said.ERROR:
        return Submitted(outcome=SubmitOutcome.UNKNOWN)
    if upstream_id:
        return Submitted(outcome=SubmitOutcome.ACCEPTED, upstream_id=upstream_id, figures=_figures(answer))
    if message and said is not _Said.SUCCESS:
        return refusal(message)
    if said is _Said.ERROR:
        return Submitted(outcome=SubmitOutcome.REJECTED)
    return Submitted(outcome=SubmitOutcome.UNKNOWN)


def _declares_task(answer: Mapping[str, Any]) -> bool:
    return _said(answer.get("err_code")) is _Said.SUCCESS and bool(_identifier(answer.get("task_id")))


def read_check(body: bytes, base: str = "", report: Report = _ignore, clean: Callable[[str], str] = str) -> Check:
    """What the answer to a check amounts to. One that holds no JSON object is not the vendor's, and so is none.

    Links to results are relative to `base` and pass through `clean`, which returns an empty text for one that must not
    be used; each field whose links can't be used is reported.
    """
    answer = decode_object(body)
    said = _said(answer.get("err_code"))
    message = plain(answer.get("err_msg"))
    if not answer:
        return Check(answered=Answered.NOTHING)
    if said is _Said.ERROR or (said is _Said.NOTHING and message):
        return Check(answered=Answered.SILENT if is_unknown_task(message) else Answered.UNUSABLE)
    if said is _Said.NOTHING and "status" not in answer:
        return Check(answered=Answered.UNUSABLE)
    return _told(answer, message, lambda value: clean(_url(value, base)), report)


def _told(answer: Mapping[str, Any], message: str, link: Callable[[object], str], report: Report) -> Check:
    """What an answer that is no error tells of the task. A state that has no name here means that it still runs."""
    status, figures = answer.get("status"), _figures(answer)
    match status.strip().casefold() if isinstance(status, str) else status:
        case None | "":
            return Check(answered=Answered.SILENT, figures=figures)
        case "completed":
            return _completed(answer, figures, link, report)
        case "failed":
            error = TaskError("task-failed", _failure(public(message)))
            return Check(answered=Answered.FAILED, error=error, figures=figures)
        case str():
            return Check(answered=Answered.RUNNING, figures=figures)
        case _:
            return Check(answered=Answered.UNUSABLE, figures=figures)


def _completed(answer: Mapping[str, Any], figures: Figures, link: Callable[[object], str], report: Report) -> Check:
    """A finished task; but one whose results can't be had is not taken for finished, since an end is never undone."""
    found = []
    for field, name in _RESULTS.items():
        value = answer.get(field)
        if url := link(value):
            found.append(Artifact(name, url))
        elif value:
            report(field, value)
    if not found:
        return Check(answered=Answered.UNUSABLE, figures=figures)
    return Check(answered=Answered.SUCCEEDED, artifacts=tuple(found), figures=figures)


def _failure(reason: str) -> str:
    return f"The upstream could not carry out this task: {reason}" if reason else "The upstream gave no reason."


def _said(code: object) -> _Said:
    number = _whole(int(code) if isinstance(code, bool) else code, 1)
    if number is None:
        return _Said.ERROR if isinstance(code, int) and code < 0 else _Said.NOTHING
    return _Said.ERROR if number else _Said.SUCCESS


def _figures(answer: Mapping[str, Any]) -> Figures:
    return Figures(_whole(answer.get("remaining_count"), 1), _whole(answer.get("remaining_money"), 100))


def _whole(value: object, parts: int) -> int | None:
    """A figure in its smallest unit, of which one has so many parts; None for whatever is no such figure.

    Money is rounded to that unit, since it may come out of floating-point arithmetic; a count is whole.
    """
    number = _number(value)
    if number is None or (parts == 1 and number % 1):
        return None
    rounded = round(number * parts)
    return rounded if 0 <= rounded <= _LARGEST_FIGURE else None


def _number(value: object) -> Decimal | None:
    """A finite number of a size that a figure can have, from a number or its decimal digits."""
    match value:
        case bool():
            return None
        case int() | float() if abs(value) <= _LARGEST_FIGURE:  # neither NaN nor infinite is
            return Decimal(repr(value))
        case str() if _NUMBER.fullmatch(value.strip()):
            return Decimal(value.strip())
        case _:
            return None


def _identifier(value: object) -> str:
    """A task id, without control characters around it; empty for whatever can't be one.

    A number that has passed through a float may have lost digits. One that is not positive stands for no task.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_FIGURE:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if 0 < value < 10**_LONGEST_ID else ""
    if isinstance(value, str):
        value = value.strip("\x00\t\r\n")
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > _LONGEST_ID:
        return ""
    return "" if _REPLACED in value else value


def _url(value: object, base: str) -> str:
    """The first usable address among those in a text, a list or an object; empty if there is none.

    A relative one counts only if no other is complete: beside an address there may be a file's name.
    """
    links = list(islice(_links(value), _MOST_LINKS))
    complete = (link for link in links if _COMPLETE.match(link))
    return next(filter(None, (_resolve(link, base) for link in chain(complete, links))), "")


def _links(value: object, depth: int = 0) -> Iterator[str]:
    match value:
        case str():
            yield from _BETWEEN_LINKS.split(value)
        case list() if depth < _DEEPEST_LINK:
            for each in value:
                yield from _links(each, depth + 1)
        case dict() if depth < _DEEPEST_LINK:
            for key in sorted(value, key=lambda key: _LINK_KEY.search(key) is None):
                yield from _links(value[key], depth + 1)
        case _:
            return


def _resolve(link: str, base: str) -> str:
    """Return a link as a browser would follow it from `base`; empty for one that leads nowhere."""
    link = _LINE_BREAKS.sub("", link).strip()
    if not _COMPLETE.match(link) and not _RELATIVE.match(link):
        return ""
    path, mark, query = link.partition("?")
    try:
        url = urljoin(base, f"{path.replace(chr(92), '/')}{mark}{query}".replace(" ", "%20"))
    except ValueError:
        return ""
    return url if _is_address(url) else ""


def _is_address(url: str) -> bool:
    if len(url) > _LONGEST_URL or not url.isprintable():
        return False
    try:
        parts = urlsplit(url)
        is_reachable = bool(parts.hostname) and "%" not in (parts.hostname or "") and parts.port != 0
    except ValueError:
        return False
    return is_reachable and parts.scheme in {"http", "https"}
