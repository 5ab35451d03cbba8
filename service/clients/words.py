"""The vendor's messages: what they mean for an account, and what of them a tenant may read."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import quote, urlsplit

from service.telemetry.redaction import spellings
from service.usecases.ports import SubmitOutcome, Submitted

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
    return Submitted(outcome=SubmitOutcome.REJECTED, reason=public(message))


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
