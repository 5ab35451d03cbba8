"""The vendor's answers: its structs, its four messages, and the ways of the dials to spoil them."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from service.sandbox.dials import Wrong

UNKNOWN_ACCOUNT: Final = "账户不存在"
NO_BALANCE: Final = "账户剩余次数不足"
UNKNOWN_TASK: Final = "任务未找到或状态未知"
_REJECTED: Final = "任务提交失败"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a submit or a check answers. A field that is unset is left out of the JSON."""

    err_code: int = 0
    err_msg: str | UnsetType = UNSET
    task_id: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    images_url: str | UnsetType = UNSET
    vector_url: str | UnsetType = UNSET
    grid_url: str | UnsetType = UNSET
    remaining_count: int | UnsetType = UNSET
    remaining_money: int | UnsetType = UNSET


def refusal(message: str) -> Answer:
    """Give the answer of a call that was refused."""
    return Answer(err_code=1, err_msg=message)


def rejected(reason: str, colon: str) -> str:
    """Give the message of a submit that was rejected for a reason."""
    return f"{_REJECTED}{colon}{reason}"


def spoiled(answer: Answer, wrong: dict[Any, Wrong]) -> dict[str, Any]:
    """Give the answer's JSON object with the named fields made wrong.

    Only a field that the answer has is spoiled, except that `null` also puts one where there was none: a state that
    is null stands in an answer without results.
    """
    content: dict[str, Any] = msgspec.to_builtins(answer)
    for name, way in wrong.items():
        if way == "null":
            content[name] = None
        elif name not in content:
            continue
        elif way == "missing":
            del content[name]
        else:
            content[name] = _mistyped(content[name], way)
    return content


def _mistyped(value: str | int, way: Wrong) -> str | int | float:
    if way == "string":
        return str(value)
    number = int(value) if isinstance(value, int) or value.isdecimal() else 7
    if way == "float":
        return number + 0.5
    return -1 - number if way == "negative" else number
