"""The vendor's messages: which ones close an account, and what tenants see of them."""

from __future__ import annotations

import json
from base64 import b64encode

import pytest

from service.clients.vendor_api import (
    mask_key,
    parse_check_response,
    parse_submit_response,
    translate_reason,
    unmask_key,
)
from service.usecases.ports import SubmitOutcome, SubmitResult

REJECTED, EXHAUSTED, INVALID = SubmitOutcome.REJECTED, SubmitOutcome.EXHAUSTED, SubmitOutcome.INVALID_ACCOUNT

PRIVATE_MESSAGES = [
    *("账户剩余次数不足", "错误:账户不存在", "账户不存在的图片", "处理失败:账户余额仅剩3元", "重试次数不足"),
    *("insufficient balance", "Account main is not known", "bad user_key"),
    "HTTPConnectionPool(host='10.1.2.3', port=8188): Max retries exceeded … Traceback (most recent call last)",
    *("Traceback (most recent call last): File x", "host=worker", "no answer on port 8188"),
    *("KeyError: 'steps'", "RuntimeException", "[Errno 111] refused", "<class Foo>", "10.1.2.3"),
    *("[::1]:8188", "requests.exceptions.ConnectionError: refused by worker", "/data/x.png"),
]
"""Messages about the account, or of which nothing remains without internals."""

PARTS = {
    "图片损坏10.1.2.3处理": "图片损坏…处理",
    "at 10.1.2.3:8188.": "at ….",
    "at fe80::1:2%eth0 now": "at … now",
    "at ::ffff:10.1.2.3": "at …",
    "at 2001:db8::8a2e:370:7334, twice": "at …, twice",
    "at worker-3:8188": "at …",
    "at localhost:80 now": "at … now",
    "at gpu.internal.example now": "at … now",
    "can't open /data/models/x.ckpt now": "can't open … now",
    r"can't open C:\models\x now": "can't open … now",
    "can't open ~/models": "can't open …",
    "打开../models/a失败": "打开…失败",
    "see models/sd/x.ckpt": "see …",
    "from ftp://x/y and REDIS://z": "from … and …",
    "支持 JPEG/PNG/WEBP,1.5 MB": "支持 JPEG/PNG/WEBP,1.5 MB",
    "图片/视频 损坏": "图片/视频 损坏",
    "错误:图片损坏": "图片损坏",
    "参数steps超出范围(20-40)": "参数steps超出范围(20-40)",
    "a ratio of 3:2": "a ratio of 3:2",
    "see http://10.0.0.1/x?user_key=1 now": "see … now",
    "任务提交失败：图片损坏": "图片损坏",
    "a\x00b\n\tc\u202e": "a b c",
    "长" * 600: "长" * 500,
}
"""Messages, and what tenants see of them."""


def parse_rejection(message: str) -> SubmitResult:
    return parse_submit_response(json.dumps({"err_code": 1, "err_msg": message}).encode())


def parse_failure(message: str) -> str:
    check = parse_check_response(json.dumps({"err_code": 0, "status": "Failed", "err_msg": message}).encode())
    assert check.error
    return check.error.detail


KEY = "hush/hush+key"


@pytest.mark.parametrize(
    ("link", "shown", "fetched"),
    [
        ("http://x/1.png?a=b", "http://x/1.png?a=b", None),
        (f"http://x/{KEY}/1.png", "http://x/%7Buser_key%7D/1.png", "http://x/hush%2Fhush%2Bkey/1.png"),
        (
            "http://x/1.png?k=hush%2Fhush%2Bkey&l=hush/hush%2Bkey",
            "http://x/1.png?k=%7Buser_key%7D&l=%7Buser_key%7D",
            "http://x/1.png?k=hush%2Fhush%2Bkey&l=hush%2Fhush%2Bkey",
        ),
        (f"http://x/{KEY.upper()}/1.png", "", None),
        (f"http://x/{KEY.encode().hex()}/1.png", "", None),
        (f"http://x/{b64encode(KEY.encode()).decode()}/1.png", "", None),
        ("http://hush%2Fhush%2Bkey@x/1.png", "", None),
        ("http://x/%7Buser_key%7D/1.png", "", None),
    ],
)
def test_links_with_the_key(link: str, shown: str, fetched: str | None) -> None:
    """A link with the key is stored and shown without it and followed with it, or not used."""
    assert mask_key(KEY, link) == shown
    assert unmask_key(KEY, shown) == (fetched or shown)


def test_short_keys_in_links() -> None:
    """A key that may be an ordinary word does not corrupt a link."""
    assert mask_key("png", "http://x/1.png") == "http://x/1.png"


@pytest.mark.parametrize("message", PRIVATE_MESSAGES)
def test_private(message: str) -> None:
    """Such a message never reaches a tenant, neither in a rejection nor in a failed task."""
    assert parse_rejection(message).reason == ""
    assert parse_failure(message) == "The upstream gave no reason."


@pytest.mark.parametrize(("message", "shown"), PARTS.items())
def test_addresses(message: str, shown: str) -> None:
    """Addresses, hosts and paths are removed from a message; the rest is shown."""
    rejection = parse_rejection(message)
    assert (rejection.outcome, rejection.reason) == (REJECTED, shown)
    assert parse_failure(message) == f"The upstream could not process this task: {shown}"


@pytest.mark.parametrize("prefix", ["", "错误:", "任务提交失败：", "任务提交失败: 错误:", "Error: "])
@pytest.mark.parametrize("end", ["", "。", ",请联系客服"])
@pytest.mark.parametrize(
    ("words", "outcome"),
    [("账户不存在", INVALID), ("账号不存在", INVALID), ("账户剩余次数不足", EXHAUSTED), ("余额不足", EXHAUSTED)],
)
def test_closing(prefix: str, words: str, end: str, outcome: SubmitOutcome) -> None:
    """A message that only states that the account is unusable closes it."""
    assert parse_rejection(prefix + words + end) == SubmitResult(outcome=outcome)


@pytest.mark.parametrize("message", ["账户不存在的图片", "图片所属账户不存在", "重试次数不足", "采样次数不足,参数错误"])
def test_not_closing(message: str) -> None:
    """A sentence that merely contains such words closes no account."""
    assert parse_rejection(message).outcome is REJECTED


def test_english() -> None:
    """Known reasons are also returned in English."""
    for reason in ("图片文件已损坏", "无法识别的图片格式", "参数steps超出范围(20-40)"):
        english = parse_rejection(f"任务提交失败:{reason}").reason_en
        assert english == translate_reason(reason)
        assert english
        assert english.isascii()
    assert translate_reason("天气不好") is None
