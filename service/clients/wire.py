"""The vendor's wire: form fields out, answers in, its words into the gateway's.

Answers are read leniently, since a type that is slightly wrong must neither lose a task that was paid for nor be taken
for a figure. Nothing here raises for anything that an answer holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import msgspec

from service.clients.words import is_unknown_task, plain, public, refusal
from service.domain.account import Figures
from service.domain.task import Artifact, ArtifactName, Catalogue, Kind, Options, TaskError
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
_BOM = b"\xef\xbb\xbf"


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


class _Said(Enum):
    """What `err_code` says, if anything."""

    SUCCESS = 0
    ERROR = 1
    NOTHING = 2


def read_submit(body: bytes) -> Submitted:
    """What the answer to a submit amounts to.

    `err_code` and the rest may contradict each other. A task id is believed unless an error was declared, since it is
    all that is left of a task that was paid for. A declared error is believed, and costs nothing, unless a task id
    stands beside it: then the task may have been accepted, whatever the message says. So may what remains: unknown.
    """
    answer = _object(body)
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


def read_check(body: bytes) -> Check:
    """What the answer to a check amounts to. One that holds no JSON object is not the vendor's, and so is none."""
    answer = _object(body)
    said = _said(answer.get("err_code"))
    message = plain(answer.get("err_msg"))
    if not answer:
        return Check(answered=Answered.NOTHING)
    if said is _Said.ERROR or (said is _Said.NOTHING and message):
        return Check(answered=Answered.SILENT if is_unknown_task(message) else Answered.UNUSABLE)
    if said is _Said.NOTHING and "status" not in answer:
        return Check(answered=Answered.UNUSABLE)
    return _told(answer, message)


def _told(answer: Mapping[str, Any], message: str) -> Check:
    """What an answer that is no error tells of the task. A state that has no name here means that it still runs."""
    status, figures = answer.get("status"), _figures(answer)
    match status.strip().casefold() if isinstance(status, str) else status:
        case None | "":
            return Check(answered=Answered.SILENT, figures=figures)
        case "completed":
            return _completed(answer, figures)
        case "failed":
            error = TaskError("task-failed", _failure(public(message)))
            return Check(answered=Answered.FAILED, error=error, figures=figures)
        case str():
            return Check(answered=Answered.RUNNING, figures=figures)
        case _:
            return Check(answered=Answered.UNUSABLE, figures=figures)


def _completed(answer: Mapping[str, Any], figures: Figures) -> Check:
    """A finished task; but one whose results can't be had is not taken for finished, since an end is never undone."""
    found = tuple(Artifact(name, url) for field, name in _RESULTS.items() if (url := _url(answer.get(field))))
    if not found:
        return Check(answered=Answered.UNUSABLE, figures=figures)
    return Check(answered=Answered.SUCCEEDED, artifacts=found, figures=figures)


def _failure(reason: str) -> str:
    return f"The upstream could not carry out this task: {reason}" if reason else "The upstream gave no reason."


def _object(body: bytes) -> Mapping[str, Any]:
    """The JSON object of an answer; empty where it holds none."""
    try:
        answer = msgspec.json.decode(body.removeprefix(_BOM))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _said(code: object) -> _Said:
    number = _whole(int(code) if isinstance(code, bool) else code, 1)
    if number is None:
        return _Said.ERROR if isinstance(code, int) and code < 0 else _Said.NOTHING
    return _Said.ERROR if number else _Said.SUCCESS


def _figures(answer: Mapping[str, Any]) -> Figures:
    return Figures(_whole(answer.get("remaining_count"), 1), _whole(answer.get("remaining_money"), 100))


def _whole(value: object, parts: int) -> int | None:
    """A figure in its smallest unit, of which one has so many parts; None for whatever is not exactly such a figure."""
    number = _number(value)
    if number is None or number * parts % 1 or number * parts > _LARGEST_FIGURE:
        return None
    return int(number * parts)


def _number(value: object) -> Decimal | None:
    """A number that is not negative, from a number or its decimal digits."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int) and not 0 <= value <= _LARGEST_FIGURE:
        return None
    text = value.strip() if isinstance(value, str) else format(Decimal(repr(value)), "f")
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def _identifier(value: object) -> str:
    """A task id; empty for whatever can't be one."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1 << 64:
        value = str(value)
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > _LONGEST_ID:
        return ""
    return value


def _url(value: object) -> str:
    """The first usable address among one, several with commas between them, or a list; empty if there is none."""
    return next((url for url in _candidates(value) if _is_address(url)), "")


def _candidates(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield from (part.strip() for part in re.split(r",(?=\s*https?://)", value))
    elif isinstance(value, list):
        yield from (each.strip() for each in value if isinstance(each, str))


def _is_address(url: str) -> bool:
    if len(url) > _LONGEST_URL or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
