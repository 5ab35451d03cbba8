"""The upstream's reasons in English, for those who do not read Chinese."""

from __future__ import annotations

from collections.abc import Mapping

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
