"""The vendor's wire format: form fields, responses, messages and links.

Responses are parsed leniently: a slightly wrong type must neither lose a paid task nor be taken for an amount.
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

from service.clients.http import decode_object
from service.domain.ledger import Balance
from service.domain.tasks import VENDOR_FIELDS, Artifact, ArtifactName, Catalogue, Kind, Options, TaskError
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
"""Terms about the paying account, which is not the tenant's."""
_INTERNALS = re.compile(
    r"traceback|exception|errno|端口"
    r"|[a-z](?:error|pool)\b|[a-z_]\(.*=|<.*>|\bobject at\b|\bline \d|0x[0-9a-f]{4}"
    r"|(?<![a-z])(?:host|hostname|port)(?:\s*[=:'\"]|\s+\d)",
    re.IGNORECASE,
)
"""Program output, which is useless to tenants and reveals the vendor's internals."""
_ADDRESS = re.compile(
    r"[a-z][a-z0-9+.-]*://\S+"
    r"|(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d)(?::\d+)?"
    r"|(?<![\w:])\[?(?:[0-9a-f]{0,4}:){2,7}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4})(?:%\w+)?(?:\]:\d+|\])?"
    r"|(?<![\w./\\~-])(?:[\w~-]+[\\/.])*[\w-]+\.[a-z][a-z0-9]+(?::\d+)?"
    r"|(?<![\w.-])(?=[\d.-]*[a-z_])[\w.-]+:\d{2,5}(?!\d)"
    r"|(?<![\w.~])(?:[a-z]:|~|\.{1,2})?[\\/](?:[\w.@~-]+[\\/]?)+",
    re.IGNORECASE | re.ASCII,
)
"""A URL, IPv4, IPv6, dotted name, name with a port, or path."""
HideKey = Callable[[str], str]
"""Returns a text without the account's key."""


def clean_message(value: object, hide: HideKey = str) -> str:
    """Return a message as one printable line without the key; empty if it is no text."""
    if not isinstance(value, str):
        return ""
    # Cut only then: a part of a key is not recognised.
    text = hide(value)[: 4 * _MAX_MESSAGE_LENGTH]
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def parse_refusal(message: str) -> SubmitResult:
    """Return the refusal for a message that is not empty.

    Only a message that consists of nothing else closes an account: a reason may also just mention it.
    """
    core = _strip_prefix(message).strip(_PUNCTUATION)
    if _UNKNOWN_ACCOUNT.fullmatch(core):
        return SubmitResult(outcome=SubmitOutcome.INVALID_ACCOUNT)
    if _BALANCE_EXHAUSTED.fullmatch(core):
        return SubmitResult(outcome=SubmitOutcome.EXHAUSTED)
    reason = tenant_message(message)
    return SubmitResult(outcome=SubmitOutcome.REJECTED, reason=reason, reason_en=translate_reason(reason))


def tenant_message(message: str) -> str:
    """Return what a tenant may read: nothing about the account or internals, and no addresses."""
    if _INTERNALS.search(message):
        return ""
    reason = _ADDRESS.sub("…", _strip_prefix(message))
    if _ACCOUNT_TERMS.search(reason) or not any(character.isalnum() for character in reason):
        return ""
    return reason[:_MAX_MESSAGE_LENGTH]


def _strip_prefix(message: str) -> str:
    while match := _MESSAGE_PREFIX.match(message):
        if match.end() == len(message):
            break
        message = message[match.end() :]
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
"""A path or file name, but neither a sentence nor a placeholder word."""


def build_form_fields(options: Options, catalogue: Catalogue) -> Mapping[str, str]:
    """Return the form fields of a submit, without key and image."""
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
        fields[VENDOR_FIELDS[option]] = text
    return fields


OnUnusableLink = Callable[[str, object], None]
"""Called with name and value of a field whose links are unusable."""


class ErrCode(Enum):
    """Meaning of `err_code`."""

    SUCCESS = 0
    ERROR = 1
    ABSENT = 2


def parse_submit_response(
    body: bytes, status: int = 200, retry_after: float | None = None, hide: HideKey = str
) -> SubmitResult:
    """Return the outcome of a submit; its reason has passed through `hide`.

    A body that declares success and names a task is an acceptance, whatever its status. Otherwise a 4xx is a refusal,
    with the vendor's message if there is one, and so is a redirect to another base address. Anything else has an
    unknown outcome.
    """
    response = decode_object(body)
    declares_success = _parse_err_code(response.get("err_code")) is ErrCode.SUCCESS
    if 200 <= status < 300 or (declares_success and _parse_task_id(response.get("task_id"))):
        return _parse_successful_submit(response, hide)
    if status in {301, 302, 307, 308}:  # the base address is wrong
        return SubmitResult(outcome=SubmitOutcome.REDIRECTED)
    if not 400 <= status < 500:
        return SubmitResult(outcome=SubmitOutcome.UNKNOWN)
    message = clean_message(response.get("err_msg"), hide)
    refusal = parse_refusal(message) if message else SubmitResult(outcome=SubmitOutcome.REJECTED)
    if refusal.outcome is not SubmitOutcome.REJECTED:
        return refusal
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return SubmitResult(outcome=SubmitOutcome.BUSY, retry_after_seconds=retry_after)
    return SubmitResult(
        outcome=SubmitOutcome.REJECTED, reason=refusal.reason or f"HTTP {status}", reason_en=refusal.reason_en
    )


def _parse_successful_submit(response: Mapping[str, Any], hide: HideKey) -> SubmitResult:
    """Return the outcome of a submit whose status is 2xx.

    `err_code` may contradict the rest. A task id is trusted unless an error is declared, since it is all that is left
    of a paid task. A declared error is trusted, and costs nothing, unless there is a task id: then the task may have
    been accepted.
    """
    err_code = _parse_err_code(response.get("err_code"))
    upstream_id = _parse_task_id(response.get("task_id"))
    message = clean_message(response.get("err_msg"), hide)
    if upstream_id and err_code is ErrCode.ERROR:
        return SubmitResult(outcome=SubmitOutcome.UNKNOWN)
    if upstream_id:
        return SubmitResult(outcome=SubmitOutcome.ACCEPTED, upstream_id=upstream_id, balance=_parse_balance(response))
    if message and err_code is not ErrCode.SUCCESS:
        return parse_refusal(message)
    if err_code is ErrCode.ERROR:
        return SubmitResult(outcome=SubmitOutcome.REJECTED)
    return SubmitResult(outcome=SubmitOutcome.UNKNOWN)


def parse_check_response(
    body: bytes,
    base_url: str = "",
    on_unusable_link: OnUnusableLink = lambda _field, _value: None,
    hide: HideKey = str,
) -> CheckResult:
    """Return the result of a check; a body without a JSON object is not the vendor's.

    Links are resolved against `base_url`. The message has passed through `hide`, the links have not.
    """
    response = decode_object(body)
    err_code = _parse_err_code(response.get("err_code"))
    message = clean_message(response.get("err_msg"), hide)
    if not response:
        return CheckResult(outcome=CheckOutcome.NO_RESPONSE)
    if err_code is ErrCode.ERROR or (err_code is ErrCode.ABSENT and message):
        is_unknown_task = _strip_prefix(message).strip(_PUNCTUATION).startswith(_UNKNOWN_TASK)
        return CheckResult(outcome=CheckOutcome.NOT_FOUND if is_unknown_task else CheckOutcome.INVALID)
    if err_code is ErrCode.ABSENT and "status" not in response:
        return CheckResult(outcome=CheckOutcome.INVALID)
    return _parse_status(response, message, lambda value: _first_usable_link(value, base_url), on_unusable_link)


def _parse_status(
    response: Mapping[str, Any], message: str, parse_link: Callable[[object], str], on_unusable_link: OnUnusableLink
) -> CheckResult:
    """Parse a response that is no error; an unknown state means that the task still runs."""
    status, balance = response.get("status"), _parse_balance(response)
    match status.strip().casefold() if isinstance(status, str) else status:
        case None | "":
            return CheckResult(outcome=CheckOutcome.NOT_FOUND, balance=balance)
        case "completed":
            return _parse_results(response, balance, parse_link, on_unusable_link)
        case "failed":
            reason = tenant_message(message)
            detail = f"The upstream could not process this task: {reason}" if reason else "The upstream gave no reason."
            return CheckResult(outcome=CheckOutcome.FAILED, error=TaskError("task-failed", detail), balance=balance)
        case str():
            return CheckResult(outcome=CheckOutcome.RUNNING, balance=balance)
        case _:
            return CheckResult(outcome=CheckOutcome.INVALID, balance=balance)


def _parse_results(
    response: Mapping[str, Any], balance: Balance, parse_link: Callable[[object], str], on_unusable_link: OnUnusableLink
) -> CheckResult:
    """Return a finished task only if a result is usable, since a final state is never undone."""
    artifacts = []
    for field, name in _RESULT_FIELDS.items():
        value = response.get(field)
        if url := parse_link(value):
            artifacts.append(Artifact(name, url))
        elif value:
            on_unusable_link(field, value)
    if not artifacts:
        return CheckResult(outcome=CheckOutcome.INVALID, balance=balance)
    return CheckResult(outcome=CheckOutcome.SUCCEEDED, artifacts=tuple(artifacts), balance=balance)


def _parse_err_code(code: object) -> ErrCode:
    number = _parse_amount(int(code) if isinstance(code, bool) else code, 1)
    if number is None:
        return ErrCode.ERROR if isinstance(code, int) and code < 0 else ErrCode.ABSENT
    return ErrCode.ERROR if number else ErrCode.SUCCESS


def _parse_balance(response: Mapping[str, Any]) -> Balance:
    return Balance(
        _parse_amount(response.get("remaining_count"), 1), _parse_amount(response.get("remaining_money"), 100)
    )


def _parse_amount(value: object, units: int) -> int | None:
    """Return an amount in its smallest unit (`units` per whole); None if it is not an amount.

    Money is rounded, since it may come from floating-point arithmetic; a count must be an integer.
    """
    match value:
        case bool():
            return None
        case int() | float() if abs(value) <= _MAX_AMOUNT:  # excludes NaN and infinity
            number = Decimal(repr(value))
        case str() if _NUMBER.fullmatch(value.strip()):
            number = Decimal(value.strip())
        case _:
            return None
    if units == 1 and number % 1:
        return None
    rounded = round(number * units)
    return rounded if 0 <= rounded <= _MAX_AMOUNT else None


def _parse_task_id(value: object) -> str:
    """Return a task id without surrounding control characters; empty if it is none.

    A large float may have lost digits. Numbers that are not positive are no ids.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_AMOUNT:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if 0 < value < 10**_MAX_ID_LENGTH else ""
    if isinstance(value, str):
        value = value.strip("\x00\t\r\n")
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > _MAX_ID_LENGTH:
        return ""
    return "" if "\ufffd" in value else value  # which replaces an undecodable byte


def _first_usable_link(value: object, base_url: str) -> str:
    """Return the first usable link of a text, list or object; empty if there is none.

    Relative links come last: beside a URL there may be a file name.
    """
    links = list(islice(_iterate_links(value), _MAX_LINKS))
    absolute = (link for link in links if _ABSOLUTE_LINK.match(link))
    return next(filter(None, (_resolve_link(link, base_url) for link in chain(absolute, links))), "")


def _iterate_links(value: object, depth: int = 0) -> Iterator[str]:
    match value:
        case str():
            yield from _LINK_SEPARATOR.split(value)
        case list() if depth < _MAX_LINK_DEPTH:
            for item in value:
                yield from _iterate_links(item, depth + 1)
        case dict() if depth < _MAX_LINK_DEPTH:
            for key in sorted(value, key=lambda key: _LINK_KEY.search(key) is None):
                yield from _iterate_links(value[key], depth + 1)
        case _:
            return


def _resolve_link(link: str, base_url: str) -> str:
    """Return a link as a browser would follow it; empty if it leads nowhere."""
    link = _LINE_BREAKS.sub("", link).strip()
    if not _ABSOLUTE_LINK.match(link) and not _RELATIVE_LINK.match(link):
        return ""
    path, mark, query = link.partition("?")
    try:
        url = urljoin(base_url, f"{path.replace(chr(92), '/')}{mark}{query}".replace(" ", "%20"))
        parts = urlsplit(url)
        is_reachable = parts.hostname and "%" not in parts.hostname and parts.port != 0
    except ValueError:
        return ""
    is_valid = len(url) <= _MAX_URL_LENGTH and url.isprintable() and parts.scheme in {"http", "https"}
    return url if is_reachable and is_valid else ""


_ENGLISH_REASONS: Mapping[str, str] = {
    "缺少参数": "A parameter is missing.",
    "参数": "A parameter has an invalid value.",
    "格式": "The format of the image is not supported.",
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
    "服务器": "The upstream has an internal error.",
    "处理失败": "The image could not be processed.",
    "内部错误": "The upstream has an internal error.",
}
"""By keyword; the first match counts."""


def translate_reason(reason: str) -> str | None:
    return next((english for keyword, english in _ENGLISH_REASONS.items() if keyword in reason), None)
