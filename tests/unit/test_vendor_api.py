"""The vendor's API: forms of submits and parsing of responses."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from service.clients.vendor_api import build_form_fields, parse_check_response, parse_submit_response, translate_reason
from service.domain.ledger import Balance
from service.domain.tasks import (
    DEFAULT_CATALOGUE,
    Catalogue,
    FaceEnhanceOptions,
    SeamlessOptions,
    UpscaleOptions,
    VectorizeOptions,
)
from service.usecases.ports import CheckResult, SubmitOutcome, SubmitResult

ACCEPTED, REJECTED, UNKNOWN = SubmitOutcome.ACCEPTED, SubmitOutcome.REJECTED, SubmitOutcome.UNKNOWN
EXHAUSTED, INVALID = SubmitOutcome.EXHAUSTED, SubmitOutcome.INVALID_ACCOUNT


def parse_submit(**answer: Any) -> SubmitResult:
    return parse_submit_response(json.dumps(answer).encode())


def parse_check(**answer: Any) -> CheckResult:
    return parse_check_response(json.dumps(answer).encode())


def test_upscale_fields() -> None:
    assert build_form_fields(UpscaleOptions(), DEFAULT_CATALOGUE) == {
        "sdxl_model_dropdown": "通用模型",
        "style_dropdown": "通用风格",
        "upscale": "2.0",
        "s_noise": "1.003",
        "steps": "30",
        "high_fidelity": "false",
        "strong_inpaint": "false",
        "strong_inpaint_intensity": "0.5",
        "prompt": "",
        "neg_prompt": "",
        "vector_switch": "false",
        "color_count": "5",
    }


def test_chosen_options() -> None:
    catalogue = Catalogue(models={"general": "通用模型", "anime": "动漫"}, styles={"general": "通用风格"})
    options = UpscaleOptions(
        model="anime", style="gone", steps=20, high_fidelity=True, inpaint_strength=1e-05, prompt="猫\n", vector=True
    )
    fields = build_form_fields(options, catalogue)
    assert fields["sdxl_model_dropdown"] == "动漫"
    assert fields["style_dropdown"] == "gone"
    assert fields["steps"] == "20"
    assert fields["high_fidelity"] == fields["vector_switch"] == "true"
    assert fields["strong_inpaint_intensity"] == "0.00001"
    assert fields["prompt"] == "猫\n"


def test_other_fields() -> None:
    assert build_form_fields(VectorizeOptions(colors=16), DEFAULT_CATALOGUE) == {"color_count": "16"}
    assert build_form_fields(FaceEnhanceOptions(), DEFAULT_CATALOGUE) == {}
    assert build_form_fields(SeamlessOptions(fit=0.9), DEFAULT_CATALOGUE) == {"fit": "0.9"}


@pytest.mark.parametrize("code", [0, "0", 0.0, "0.0", False, " 0 "])
def test_accepted(code: object) -> None:
    """A success with a task id is accepted, whatever the type of its code."""
    assert parse_submit(err_code=code, task_id="t-1", remaining_count=5, remaining_money=300) == SubmitResult(
        outcome=ACCEPTED, upstream_id="t-1", balance=Balance(5, 30_000)
    )


@pytest.mark.parametrize("code", [None, "ok", [], 0.5, {}])
def test_task_id_without_a_code(code: object) -> None:
    """A task id without an error counts: the task may have been charged."""
    assert parse_submit(err_code=code, task_id="t-1").upstream_id == "t-1"
    assert parse_submit(task_id="t-1").outcome is ACCEPTED


@pytest.mark.parametrize(
    ("task_id", "parsed"),
    [
        ("a b", "a b"),
        (42, "42"),
        (7.0, "7"),
        (1 << 65, str(1 << 65)),
        (10**30, "1" + "0" * 30),
        ("任务", "任务"),
        ("t-1\r\n", "t-1"),
        ("\tt-1\x00", "t-1"),
        ("x" * 256, "x" * 256),
    ],
)
def test_task_ids(task_id: object, parsed: str) -> None:
    """A task id is any short printable text, or a number."""
    assert parse_submit(err_code=0, task_id=task_id).upstream_id == parsed


@pytest.mark.parametrize(
    "task_id",
    [None, "", "  ", 0, -1, 0.0, "a\nb", "\x00", "x" * 257, True, 1.5, 1e20, 10**256, [], {}, ["t"], "\u202e"],
)
def test_success_without_a_usable_task_id(task_id: object) -> None:
    assert parse_submit(err_code=0, task_id=task_id) == SubmitResult(outcome=UNKNOWN)
    assert parse_submit(err_code=0, err_msg="任务提交失败:坏", task_id=task_id).outcome is UNKNOWN


@pytest.mark.parametrize("code", [1, "1", True, 2, -1, 1.0])
@pytest.mark.parametrize(
    ("message", "outcome", "reason"),
    [
        ("账户不存在", INVALID, ""),
        ("账户剩余次数不足", EXHAUSTED, ""),
        (" 账户剩余次数不足。", EXHAUSTED, ""),
        ("任务提交失败:图片损坏", REJECTED, "图片损坏"),
        ("任务提交失败：图片损坏", REJECTED, "图片损坏"),
        ("任务提交失败", REJECTED, "任务提交失败"),
        ("任务提交失败:账户剩余次数不足", EXHAUSTED, ""),
        ("任务提交失败：账户余额不足", EXHAUSTED, ""),
        ("something else", REJECTED, "something else"),
        ("see http://10.0.0.1/x?user_key=1 now", REJECTED, "see … now"),
        ("a\x00b\n\tc\u202e", REJECTED, "a b c"),
        ("长" * 600, REJECTED, "长" * 500),
        ("", REJECTED, ""),
        (None, REJECTED, ""),
        (7, REJECTED, ""),
    ],
)
def test_refusals(code: object, message: object, outcome: SubmitOutcome, reason: str) -> None:
    """An error is classified by its message, which is passed on without balances and addresses."""
    expected = SubmitResult(outcome=outcome, reason=reason, reason_en=translate_reason(reason))
    assert parse_submit(err_code=code, err_msg=message) == expected


@pytest.mark.parametrize("code", [1, None])
@pytest.mark.parametrize("task_id", [None, "", 0, -1])
def test_refusal_with_an_unusable_task_id(code: object, task_id: object) -> None:
    assert parse_submit(err_code=code, err_msg="账户剩余次数不足", task_id=task_id).outcome is EXHAUSTED


def test_message_without_a_code() -> None:
    """A message without a code counts as an error."""
    assert parse_submit(err_msg="账户不存在").outcome is INVALID
    assert parse_submit(err_code="?", err_msg="任务提交失败:坏") == SubmitResult(outcome=REJECTED, reason="坏")


@pytest.mark.parametrize("message", [None, "账户剩余次数不足", "账户不存在", "任务提交失败:图片损坏", "?"])
@pytest.mark.parametrize("code", [1, "1", True, -1])
def test_contradiction(code: object, message: object) -> None:
    """An error with a task id may have been charged, whatever its message."""
    assert parse_submit(err_code=code, task_id="t-1", err_msg=message) == SubmitResult(outcome=UNKNOWN)


TASK_TEXT = '{"err_code": 0, "task_id": "任务", "remaining_count": 4}'


@pytest.mark.parametrize(
    "body",
    [
        *(TASK_TEXT.encode(charset) for charset in ("utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be")),
        *(gzip.compress(TASK_TEXT.encode(charset), mtime=0) for charset in ("utf-8", "gbk", "utf-16")),
        *(zlib.compress(TASK_TEXT.encode(), wbits=wbits) for wbits in (zlib.MAX_WBITS, -zlib.MAX_WBITS)),
        b"\xef\xbb\xbf " + TASK_TEXT.encode(),
        TASK_TEXT.encode() + b"\x00",
    ],
)
def test_codings(body: bytes) -> None:
    """A response is parsed in any charset and content coding."""
    assert parse_submit_response(body) == SubmitResult(outcome=ACCEPTED, upstream_id="任务", balance=Balance(4))


@pytest.mark.parametrize(
    "odd",
    [
        b'"remaining_money": NaN',
        b'"remaining_money": -Infinity',
        b'"remaining_money": 1e400',
        b'"remaining_money": ' + b"9" * 10_000,
        b'"err_msg": "\\ud83d"',
        b'"err_msg": "a\nb\tc"',
        b'"err_msg": "\xff"',
        b'"err_msg": "\xe9"',
        b'"err_msg": "caf\xe9\\""',
    ],
)
def test_odd_fields(odd: bytes) -> None:
    """A malformed field is ignored, and the others count."""
    result = parse_submit_response(
        b'{"err_code": 0, "task_id": 12345678901234567890123, "remaining_count": 4, %b}' % odd
    )
    assert result == SubmitResult(outcome=ACCEPTED, upstream_id="12345678901234567890123", balance=Balance(4))


def test_refusal_in_gbk() -> None:
    body = json.dumps({"err_code": 1, "err_msg": "账户剩余次数不足"}, ensure_ascii=False).encode("gbk")
    assert parse_submit_response(body).outcome is EXHAUSTED


def test_inflated_size() -> None:
    """A response is not decompressed beyond the size limit."""
    assert parse_submit_response(gzip.compress(TASK_TEXT.encode() + b" " * 100_000)) == SubmitResult(outcome=UNKNOWN)


@pytest.mark.parametrize(
    ("value", "count", "money"),
    [
        (0, 0, 0),
        (5, 5, 500),
        ("5", 5, 500),
        (" 5 ", 5, 500),
        (5.0, 5, 500),
        ("5.00", 5, 500),
        (12.34, None, 1234),
        ("12.3", None, 1230),
        (0.1, None, 10),
        (99.80000000000001, None, 9980),
        ("99.80000000000001", None, 9980),
        (99.7999999999999, None, 9980),
        (0.3 - 0.2 - 0.1, None, 0),
        (1.004, None, 100),
        (1.006, None, 101),
        (float("nan"), None, None),
        (float("inf"), None, None),
        (2**53, 2**53, None),
        (2**53 + 1, None, None),
        (10**40, None, None),
        (-1, None, None),
        (-0.5, None, None),
        ("-1", None, None),
        (1e300, None, None),
        ("1e3", None, None),
        ("٣", None, None),
        ("", None, None),
        ("many", None, None),
        (True, None, None),
        (False, None, None),
        (None, None, None),
        ([5], None, None),
        ({}, None, None),
    ],
)
def test_balances(value: object, count: int | None, money: int | None) -> None:
    """A balance is taken only if it is an exact number: never guessed, never zero by default."""
    figures = Balance(count, money)
    assert parse_submit(err_code=0, task_id="t", remaining_count=value, remaining_money=value).balance == figures
    assert parse_check(err_code=0, status="x", remaining_count=value, remaining_money=value).balance == figures


@pytest.mark.parametrize("reason", ["图片文件已损坏", "无法识别的图片格式", "参数steps超出范围(20-40)"])
def test_english(reason: str) -> None:
    """Known reasons are also returned in English."""
    english = translate_reason(reason)
    assert english
    assert english.isascii()


def test_no_english() -> None:
    """Unknown reasons stay in Chinese."""
    assert translate_reason("天气不好") is None
