"""The vendor's wire format and messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from itertools import chain, islice
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from service.clients.http import decode_object
from service.domain.ledger import Figures
from service.domain.tasks import Artifact, ArtifactName, Catalogue, Kind, Options, TaskError
from service.telemetry.redaction import spellings
from service.usecases.ports import Answered, Check, SubmitOutcome, Submitted

_LONGEST = 500


_PUNCTUATION = " ,.;:!…，。；：！、"


_PREFIX = re.compile(r"(?:任务提交失败|任务失败|提交失败|错误|失败|error)(?:\s*[:：,，]\s*|\s+)", re.IGNORECASE)


_PLEASE = r"(?:[\s,，。;；!！]*请.*)?"


_UNKNOWN_ACCOUNT = re.compile(rf"账[户号]不存在{_PLEASE}")


_NOTHING_LEFT = re.compile(rf"(?:账[户号])?的?(?:剩余|可用)?的?(?:次数|余额)不足{_PLEASE}")


_UNKNOWN_TASK = "任务未找到或状态未知"


_PRIVATE = re.compile(
    r"账[户号]|余额|次数|金额|套餐|充值|欠费|扣费|密钥"
    r"|(?<![a-z])(?:accounts?|balances?|credits?|user[ _-]?keys?|api[ _-]?keys?)(?![a-z])",
    re.IGNORECASE,
)
"""Words about the account that pays, which is not the tenant's."""


_PROGRAM = re.compile(
    r"traceback|exception|errno|端口"
    r"|[a-z](?:error|pool)\b|[a-z_]\(.*=|<.*>|\bobject at\b|\bline \d|0x[0-9a-f]{4}"
    r"|(?<![a-z])(?:host|hostname|port)(?:\s*[=:'\"]|\s+\d)",
    re.IGNORECASE,
)
"""What only the words of a program hold, of which a tenant understands nothing, and which tell of its insides."""


_PLACE = re.compile(
    r"[a-z][a-z0-9+.-]*://\S+"
    r"|(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d)(?::\d+)?"
    r"|(?<![\w:])\[?(?:[0-9a-f]{0,4}:){2,7}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4})(?:%\w+)?(?:\]:\d+|\])?"
    r"|(?<![\w./\\~-])(?:[\w~-]+[\\/.])*[\w-]+\.[a-z][a-z0-9]+(?::\d+)?"
    r"|(?<![\w.-])(?=[\d.-]*[a-z_])[\w.-]+:\d{2,5}(?!\d)"
    r"|(?<![\w.~])(?:[a-z]:|~|\.{1,2})?[\\/](?:[\w.@~-]+[\\/]?)+",
    re.IGNORECASE | re.ASCII,
)
"""A URL, IPv4, IPv6, name with a dot in it, name with a port, or path."""


_KEY_MARK = "%7Buser_key%7D"
"""Stands in a link for the key of the account, which the fetch of the result puts back."""


_SHORTEST_SPELLING = 8
"""A shorter spelling of a key may be part of an ordinary word, unless the key itself is as short."""


def without_key(user_key: str, text: str) -> str:
    """Return a text without the key, in whatever spelling."""
    if not user_key or not text:
        return text
    return _key_pattern(user_key).sub("…", text)


@lru_cache
def _key_pattern(user_key: str) -> re.Pattern[str]:
    found = {each for each in spellings(user_key) if len(each) >= min(len(user_key), _SHORTEST_SPELLING)}
    return re.compile("|".join(re.escape(each) for each in sorted(found, key=len, reverse=True)), re.IGNORECASE)


def mask_key(user_key: str, url: str) -> str:
    """Return a link with a mark in place of the key; empty if it holds the key where or as it could not be put back.

    One that holds the mark itself is not used either: the key would be sent to where it does not belong.
    """
    if _KEY_MARK in url:
        return ""
    if len(user_key) < _SHORTEST_SPELLING or without_key(user_key, url) == url:
        return url
    parts = urlsplit(url)
    start = len(f"{parts.scheme}://{parts.netloc}")
    rest = url[start:]
    for spelling in (quote(user_key, safe=""), quote(user_key), user_key):
        rest = rest.replace(spelling, _KEY_MARK)
    masked = url[:start] + rest
    return masked if without_key(user_key, masked) == masked else ""


def unmask_key(user_key: str, url: str) -> str:
    """Return a link that `mask_key` made, with the key in it again."""
    return url.replace(_KEY_MARK, quote(user_key, safe=""))


def plain(value: object) -> str:
    """A message in one line without control characters; empty for what is no text."""
    if not isinstance(value, str):
        return ""
    printable = "".join(character if character.isprintable() else " " for character in value[: 4 * _LONGEST])
    return " ".join(printable.split())


def refusal(message: str) -> Submitted:
    """A refusal by its message, which must not be empty.

    An account is closed only by a message that consists of nothing but that, since a reason may also just mention it.
    """
    gist = _gist(message)
    if _UNKNOWN_ACCOUNT.fullmatch(gist):
        return Submitted(outcome=SubmitOutcome.INVALID_ACCOUNT)
    if _NOTHING_LEFT.fullmatch(gist):
        return Submitted(outcome=SubmitOutcome.EXHAUSTED)
    reason = public(message)
    return Submitted(outcome=SubmitOutcome.REJECTED, reason=reason, reason_en=in_english(reason))


def is_unknown_task(message: str) -> bool:
    """Whether it says that the task is not known, or not just now."""
    return _gist(message).startswith(_UNKNOWN_TASK)


def public(message: str) -> str:
    """What a tenant may read of a message, without its prefix.

    That is nothing of one about the paying account or from within a program, and of others all but addresses and paths.
    """
    if _PROGRAM.search(message):
        return ""
    reason = _PLACE.sub("…", _unprefixed(message))
    if _PRIVATE.search(reason) or not any(character.isalnum() for character in reason):
        return ""
    return reason[:_LONGEST]


def _gist(message: str) -> str:
    return _unprefixed(message).strip(_PUNCTUATION)


def _unprefixed(message: str) -> str:
    while found := _PREFIX.match(message):
        if found.end() == len(message):
            break
        message = message[found.end() :]
    return message


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
    return Submitted(
        outcome=SubmitOutcome.REJECTED, reason=refused.reason or f"HTTP {status}", reason_en=refused.reason_en
    )


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


_ENGLISH: Mapping[str, str] = {
    "缺少参数": "A parameter is missing.",
    "参数": "A parameter has a value that is not taken.",
    "格式": "The format of the image is not taken.",
    "过大": "The image is too large.",
    "太大": "The image is too large.",
    "过小": "The image is too small.",
    "太小": "The image is too small.",
    "损坏": "The image is damaged.",
    "无法读取": "The image can't be read.",
    "无法识别": "The image can't be recognised.",
    "人脸": "No face was found in the image.",
    "违规": "The content of the image is not allowed.",
    "敏感": "The content of the image is not allowed.",
    "繁忙": "The upstream is too busy. Try again later.",
    "排队": "The upstream is too busy. Try again later.",
    "超时": "The upstream took too long.",
    "服务器": "The upstream has a fault of its own.",
    "处理失败": "The image could not be processed.",
    "内部错误": "The upstream has a fault of its own.",
}
"""By words that a reason holds; where several do, the first of them counts."""


def in_english(reason: str) -> str | None:
    """The gist of a reason; None for one that is not known."""
    return next((english for words, english in _ENGLISH.items() if words in reason), None)
