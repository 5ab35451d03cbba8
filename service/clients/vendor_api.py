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
from service.domain.ledger import Balance
from service.domain.tasks import Artifact, ArtifactName, Catalogue, Kind, Options, TaskError
from service.telemetry.redaction import encodings
from service.usecases.ports import CheckOutcome, CheckResult, SubmitOutcome, SubmitResult

_MAX_MESSAGE_LENGTH = 500


_PUNCTUATION = " ,.;:!…，。；：！、"


_MESSAGE_PREFIX = re.compile(r"(?:任务提交失败|任务失败|提交失败|错误|失败|error)(?:\s*[:：,，]\s*|\s+)", re.IGNORECASE)


_POLITE_SUFFIX = r"(?:[\s,，。;；!！]*请.*)?"


_UNKNOWN_ACCOUNT = re.compile(rf"账[户号]不存在{_POLITE_SUFFIX}")


_BALANCE_EXHAUSTED = re.compile(rf"(?:账[户号])?的?(?:剩余|可用)?的?(?:次数|余额)不足{_POLITE_SUFFIX}")


_UNKNOWN_TASK = "任务未找到或状态未知"


_ACCOUNT_TERMS = re.compile(
    r"账[户号]|余额|次数|金额|套餐|充值|欠费|扣费|密钥"
    r"|(?<![a-z])(?:accounts?|balances?|credits?|user[ _-]?keys?|api[ _-]?keys?)(?![a-z])",
    re.IGNORECASE,
)
"""Words about the account that pays, which is not the tenant's."""


_INTERNALS = re.compile(
    r"traceback|exception|errno|端口"
    r"|[a-z](?:error|pool)\b|[a-z_]\(.*=|<.*>|\bobject at\b|\bline \d|0x[0-9a-f]{4}"
    r"|(?<![a-z])(?:host|hostname|port)(?:\s*[=:'\"]|\s+\d)",
    re.IGNORECASE,
)
"""What only the words of a program hold, of which a tenant understands nothing, and which tell of its insides."""


_ADDRESS = re.compile(
    r"[a-z][a-z0-9+.-]*://\S+"
    r"|(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d)(?::\d+)?"
    r"|(?<![\w:])\[?(?:[0-9a-f]{0,4}:){2,7}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4})(?:%\w+)?(?:\]:\d+|\])?"
    r"|(?<![\w./\\~-])(?:[\w~-]+[\\/.])*[\w-]+\.[a-z][a-z0-9]+(?::\d+)?"
    r"|(?<![\w.-])(?=[\d.-]*[a-z_])[\w.-]+:\d{2,5}(?!\d)"
    r"|(?<![\w.~])(?:[a-z]:|~|\.{1,2})?[\\/](?:[\w.@~-]+[\\/]?)+",
    re.IGNORECASE | re.ASCII,
)
"""A URL, IPv4, IPv6, name with a dot in it, name with a port, or path."""


_KEY_PLACEHOLDER = "%7Buser_key%7D"
"""Stands in a link for the key of the account, which the fetch of the result puts back."""


_MIN_ENCODING_LENGTH = 8
"""A shorter spelling of a key may be part of an ordinary word, unless the key itself is as short."""


def remove_key(user_key: str, text: str) -> str:
    """Return a text without the key, in whatever spelling."""
    if not user_key or not text:
        return text
    return _key_pattern(user_key).sub("…", text)


@lru_cache
def _key_pattern(user_key: str) -> re.Pattern[str]:
    found = {each for each in encodings(user_key) if len(each) >= min(len(user_key), _MIN_ENCODING_LENGTH)}
    return re.compile("|".join(re.escape(each) for each in sorted(found, key=len, reverse=True)), re.IGNORECASE)


def mask_key(user_key: str, url: str) -> str:
    """Return a link with a mark in place of the key; empty if it holds the key where or as it could not be put back.

    One that holds the mark itself is not used either: the key would be sent to where it does not belong.
    """
    if _KEY_PLACEHOLDER in url:
        return ""
    if len(user_key) < _MIN_ENCODING_LENGTH or remove_key(user_key, url) == url:
        return url
    parts = urlsplit(url)
    start = len(f"{parts.scheme}://{parts.netloc}")
    rest = url[start:]
    for spelling in (quote(user_key, safe=""), quote(user_key), user_key):
        rest = rest.replace(spelling, _KEY_PLACEHOLDER)
    masked = url[:start] + rest
    return masked if remove_key(user_key, masked) == masked else ""


def unmask_key(user_key: str, url: str) -> str:
    """Return a link that `mask_key` made, with the key in it again."""
    return url.replace(_KEY_PLACEHOLDER, quote(user_key, safe=""))


def clean_message(value: object) -> str:
    """A message in one line without control characters; empty for what is no text."""
    if not isinstance(value, str):
        return ""
    printable = "".join(character if character.isprintable() else " " for character in value[: 4 * _MAX_MESSAGE_LENGTH])
    return " ".join(printable.split())


def parse_refusal(message: str) -> SubmitResult:
    """A refusal by its message, which must not be empty.

    An account is closed only by a message that consists of nothing but that, since a reason may also just mention it.
    """
    gist = _strip_message(message)
    if _UNKNOWN_ACCOUNT.fullmatch(gist):
        return SubmitResult(outcome=SubmitOutcome.INVALID_ACCOUNT)
    if _BALANCE_EXHAUSTED.fullmatch(gist):
        return SubmitResult(outcome=SubmitOutcome.EXHAUSTED)
    reason = tenant_message(message)
    return SubmitResult(outcome=SubmitOutcome.REJECTED, reason=reason, reason_en=translate_reason(reason))


def is_unknown_task(message: str) -> bool:
    """Whether it says that the task is not known, or not just now."""
    return _strip_message(message).startswith(_UNKNOWN_TASK)


def tenant_message(message: str) -> str:
    """What a tenant may read of a message, without its prefix.

    That is nothing of one about the paying account or from within a program, and of others all but addresses and paths.
    """
    if _INTERNALS.search(message):
        return ""
    reason = _ADDRESS.sub("…", _strip_prefix(message))
    if _ACCOUNT_TERMS.search(reason) or not any(character.isalnum() for character in reason):
        return ""
    return reason[:_MAX_MESSAGE_LENGTH]


def _strip_message(message: str) -> str:
    return _strip_prefix(message).strip(_PUNCTUATION)


def _strip_prefix(message: str) -> str:
    while found := _MESSAGE_PREFIX.match(message):
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


USER_KEY_FIELD = "user_key"


IMAGE_FIELD = "input_image"


TASK_ID_FIELD = "task_id"


_FORM_FIELDS: Mapping[str, str] = {
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


_RESULT_FIELDS: Mapping[str, ArtifactName] = {
    "images_url": ArtifactName.IMAGE,
    "vector_url": ArtifactName.VECTOR,
    "grid_url": ArtifactName.GRID,
}


_MAX_ID_LENGTH = 256


_MAX_URL_LENGTH = 2_048


_MAX_AMOUNT = 2**53


_NUMBER = re.compile(r"\d{1,20}(\.\d{1,20})?", re.ASCII)


_MAX_LINKS = 100


_MAX_LINK_DEPTH = 4


_LINK_SEPARATOR = re.compile(r"[,;\s]+(?=https?://)", re.IGNORECASE)


_LINK_KEY = re.compile("url|uri|href|link|src|path", re.IGNORECASE)


_LINE_BREAKS = re.compile(r"[\t\r\n]+")


_ABSOLUTE_LINK = re.compile(r"\s*(?:https?:)?[/\\]{2}[^/\\]", re.IGNORECASE)


_RELATIVE_LINK = re.compile(r"\.{0,2}[/\\][^/\\]|[^?#:]*\.\w{2,5}(?:[?#]|$)|[^\s?#:/\\]{2,}[/\\][^\s?#]")
"""A path, or the name of a file; but neither a sentence nor a word that stands for nothing."""


_REPLACEMENT_CHARACTER = "\ufffd"
"""Stands where a byte could not be decoded."""


_MOVED_STATUSES = frozenset({301, 302, 307, 308})
"""Redirects that mean that the service is elsewhere."""


def build_form_fields(options: Options, catalogue: Catalogue) -> Mapping[str, str]:
    """The form fields of a submit, without the key and the image."""
    fields = {}
    for option, value in msgspec.structs.asdict(options).items():
        if option in {"model", "style"}:
            text = catalogue.vendor_word(option, value)
        elif isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, float):
            text = format(Decimal(repr(value)), "f")
        else:
            text = str(value)
        fields[_FORM_FIELDS[option]] = text
    return fields


OnUnusableLink = Callable[[str, object], None]
"""Is called with the name and the value of a field that can't be used."""


def _ignore_link(_field: str, _value: object) -> None:
    pass


class ErrCode(Enum):
    """What `err_code` says, if anything."""

    SUCCESS = 0
    ERROR = 1
    ABSENT = 2


def parse_submit_response(body: bytes, status: int = 200, retry_after: float | None = None) -> SubmitResult:
    """Return the outcome of a submit from its response.

    A body that declares success and names a task is an acceptance, whatever its status. Otherwise a status that is no
    success decides: 4xx is a refusal, with the vendor's message if the body holds one, and so is a redirect to where
    the service is; of any other, as of a body without an object, the outcome is unknown.
    """
    answer = decode_object(body)
    if 200 <= status < 300 or _declares_task(answer):
        return _parse_successful_submit(answer)
    if status in _MOVED_STATUSES:
        return SubmitResult(outcome=SubmitOutcome.REDIRECTED)
    if not 400 <= status < 500:
        return SubmitResult(outcome=SubmitOutcome.UNKNOWN)
    message = clean_message(answer.get("err_msg"))
    refused = parse_refusal(message) if message else SubmitResult(outcome=SubmitOutcome.REJECTED)
    if refused.outcome is not SubmitOutcome.REJECTED:
        return refused
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return SubmitResult(outcome=SubmitOutcome.BUSY, retry_after_seconds=retry_after)
    return SubmitResult(
        outcome=SubmitOutcome.REJECTED, reason=refused.reason or f"HTTP {status}", reason_en=refused.reason_en
    )


def _parse_successful_submit(answer: Mapping[str, Any]) -> SubmitResult:
    """Return the outcome of a submit from a response with a status of success.

    `err_code` and the rest may contradict each other. A task id is believed unless an error was declared, since it is
    all that is left of a task that was paid for. A declared error is believed, and costs nothing, unless a task id
    stands beside it: then the task may have been accepted, whatever the message says. So may what remains: unknown.
    """
    said = _parse_err_code(answer.get("err_code"))
    upstream_id = _parse_task_id(answer.get("task_id"))
    message = clean_message(answer.get("err_msg"))
    if upstream_id and said is ErrCode.ERROR:
        return SubmitResult(outcome=SubmitOutcome.UNKNOWN)
    if upstream_id:
        return SubmitResult(outcome=SubmitOutcome.ACCEPTED, upstream_id=upstream_id, balance=_parse_balance(answer))
    if message and said is not ErrCode.SUCCESS:
        return parse_refusal(message)
    if said is ErrCode.ERROR:
        return SubmitResult(outcome=SubmitOutcome.REJECTED)
    return SubmitResult(outcome=SubmitOutcome.UNKNOWN)


def _declares_task(answer: Mapping[str, Any]) -> bool:
    return _parse_err_code(answer.get("err_code")) is ErrCode.SUCCESS and bool(_parse_task_id(answer.get("task_id")))


def parse_check_response(
    body: bytes,
    base_url: str = "",
    on_unusable_link: OnUnusableLink = _ignore_link,
    clean_link: Callable[[str], str] = str,
) -> CheckResult:
    """What the answer to a check amounts to. One that holds no JSON object is not the vendor's, and so is none.

    Links to results are relative to `base` and pass through `clean`, which returns an empty text for one that must not
    be used; each field whose links can't be used is reported.
    """
    answer = decode_object(body)
    said = _parse_err_code(answer.get("err_code"))
    message = clean_message(answer.get("err_msg"))
    if not answer:
        return CheckResult(outcome=CheckOutcome.NO_RESPONSE)
    if said is ErrCode.ERROR or (said is ErrCode.ABSENT and message):
        return CheckResult(outcome=CheckOutcome.NOT_FOUND if is_unknown_task(message) else CheckOutcome.INVALID)
    if said is ErrCode.ABSENT and "status" not in answer:
        return CheckResult(outcome=CheckOutcome.INVALID)
    return _parse_status(
        answer, message, lambda value: clean_link(_first_usable_link(value, base_url)), on_unusable_link
    )


def _parse_status(
    answer: Mapping[str, Any], message: str, parse_link: Callable[[object], str], on_unusable_link: OnUnusableLink
) -> CheckResult:
    """What an answer that is no error tells of the task. A state that has no name here means that it still runs."""
    status, figures = answer.get("status"), _parse_balance(answer)
    match status.strip().casefold() if isinstance(status, str) else status:
        case None | "":
            return CheckResult(outcome=CheckOutcome.NOT_FOUND, balance=figures)
        case "completed":
            return _parse_results(answer, figures, parse_link, on_unusable_link)
        case "failed":
            error = TaskError("task-failed", _failure_detail(tenant_message(message)))
            return CheckResult(outcome=CheckOutcome.FAILED, error=error, balance=figures)
        case str():
            return CheckResult(outcome=CheckOutcome.RUNNING, balance=figures)
        case _:
            return CheckResult(outcome=CheckOutcome.INVALID, balance=figures)


def _parse_results(
    answer: Mapping[str, Any], figures: Balance, parse_link: Callable[[object], str], on_unusable_link: OnUnusableLink
) -> CheckResult:
    """A finished task; but one whose results can't be had is not taken for finished, since an end is never undone."""
    found = []
    for field, name in _RESULT_FIELDS.items():
        value = answer.get(field)
        if url := parse_link(value):
            found.append(Artifact(name, url))
        elif value:
            on_unusable_link(field, value)
    if not found:
        return CheckResult(outcome=CheckOutcome.INVALID, balance=figures)
    return CheckResult(outcome=CheckOutcome.SUCCEEDED, artifacts=tuple(found), balance=figures)


def _failure_detail(reason: str) -> str:
    return f"The upstream could not carry out this task: {reason}" if reason else "The upstream gave no reason."


def _parse_err_code(code: object) -> ErrCode:
    number = _parse_amount(int(code) if isinstance(code, bool) else code, 1)
    if number is None:
        return ErrCode.ERROR if isinstance(code, int) and code < 0 else ErrCode.ABSENT
    return ErrCode.ERROR if number else ErrCode.SUCCESS


def _parse_balance(answer: Mapping[str, Any]) -> Balance:
    return Balance(_parse_amount(answer.get("remaining_count"), 1), _parse_amount(answer.get("remaining_money"), 100))


def _parse_amount(value: object, units: int) -> int | None:
    """A figure in its smallest unit, of which one has so many parts; None for whatever is no such figure.

    Money is rounded to that unit, since it may come out of floating-point arithmetic; a count is whole.
    """
    number = _parse_decimal(value)
    if number is None or (units == 1 and number % 1):
        return None
    rounded = round(number * units)
    return rounded if 0 <= rounded <= _MAX_AMOUNT else None


def _parse_decimal(value: object) -> Decimal | None:
    """A finite number of a size that a figure can have, from a number or its decimal digits."""
    match value:
        case bool():
            return None
        case int() | float() if abs(value) <= _MAX_AMOUNT:  # neither NaN nor infinite is
            return Decimal(repr(value))
        case str() if _NUMBER.fullmatch(value.strip()):
            return Decimal(value.strip())
        case _:
            return None


def _parse_task_id(value: object) -> str:
    """A task id, without control characters around it; empty for whatever can't be one.

    A number that has passed through a float may have lost digits. One that is not positive stands for no task.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_AMOUNT:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if 0 < value < 10**_MAX_ID_LENGTH else ""
    if isinstance(value, str):
        value = value.strip("\x00\t\r\n")
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > _MAX_ID_LENGTH:
        return ""
    return "" if _REPLACEMENT_CHARACTER in value else value


def _first_usable_link(value: object, base_url: str) -> str:
    """The first usable address among those in a text, a list or an object; empty if there is none.

    A relative one counts only if no other is complete: beside an address there may be a file's name.
    """
    links = list(islice(_iterate_links(value), _MAX_LINKS))
    complete = (link for link in links if _ABSOLUTE_LINK.match(link))
    return next(filter(None, (_resolve_link(link, base_url) for link in chain(complete, links))), "")


def _iterate_links(value: object, depth: int = 0) -> Iterator[str]:
    match value:
        case str():
            yield from _LINK_SEPARATOR.split(value)
        case list() if depth < _MAX_LINK_DEPTH:
            for each in value:
                yield from _iterate_links(each, depth + 1)
        case dict() if depth < _MAX_LINK_DEPTH:
            for key in sorted(value, key=lambda key: _LINK_KEY.search(key) is None):
                yield from _iterate_links(value[key], depth + 1)
        case _:
            return


def _resolve_link(link: str, base_url: str) -> str:
    """Return a link as a browser would follow it from `base`; empty for one that leads nowhere."""
    link = _LINE_BREAKS.sub("", link).strip()
    if not _ABSOLUTE_LINK.match(link) and not _RELATIVE_LINK.match(link):
        return ""
    path, mark, query = link.partition("?")
    try:
        url = urljoin(base_url, f"{path.replace(chr(92), '/')}{mark}{query}".replace(" ", "%20"))
    except ValueError:
        return ""
    return url if _is_http_url(url) else ""


def _is_http_url(url: str) -> bool:
    if len(url) > _MAX_URL_LENGTH or not url.isprintable():
        return False
    try:
        parts = urlsplit(url)
        is_reachable = bool(parts.hostname) and "%" not in (parts.hostname or "") and parts.port != 0
    except ValueError:
        return False
    return is_reachable and parts.scheme in {"http", "https"}


_ENGLISH_REASONS: Mapping[str, str] = {
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


def translate_reason(reason: str) -> str | None:
    """The gist of a reason; None for one that is not known."""
    return next((english for words, english in _ENGLISH_REASONS.items() if words in reason), None)
