"""The vendor's API: forms of submits, parsing of responses, and what tenants see of messages."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.clients.vendor_api import (
    build_form_fields,
    parse_check_response,
    parse_submit_response,
)
from service.domain.ledger import Balance
from service.domain.tasks import (
    DEFAULT_CATALOGUE,
    Artifact,
    ArtifactName,
    Catalogue,
    FaceEnhanceOptions,
    SeamlessOptions,
    TaskError,
    UpscaleOptions,
    VectorizeOptions,
)
from service.usecases.ports import CheckOutcome, CheckResult, SubmitOutcome, SubmitResult

ACCEPTED, REJECTED, UNKNOWN = SubmitOutcome.ACCEPTED, SubmitOutcome.REJECTED, SubmitOutcome.UNKNOWN
EXHAUSTED, INVALID = SubmitOutcome.EXHAUSTED, SubmitOutcome.INVALID_ACCOUNT
BASE = "https://api.example/v/api/check_task_status"
IMAGE = Artifact(ArtifactName.IMAGE, "http://x/y.png")
TASK_TEXT = '{"err_code": 0, "task_id": "任务", "remaining_count": 4}'


def parse_submit(**answer: Any) -> SubmitResult:
    return parse_submit_response(json.dumps(answer).encode())


def parse_check(**answer: Any) -> CheckResult:
    return parse_check_response(json.dumps(answer).encode(), BASE)


def test_form_fields() -> None:
    catalogue = Catalogue(models={"general": "通用模型", "anime": "动漫"}, styles={"general": "通用风格"})
    options = UpscaleOptions(
        model="anime", style="gone", steps=20, high_fidelity=True, inpaint_strength=1e-05, prompt="猫\n", vector=True
    )
    assert build_form_fields(options, catalogue) == {
        "sdxl_model_dropdown": "动漫",
        "style_dropdown": "gone",
        "upscale": "2.0",
        "s_noise": "1.003",
        "steps": "20",
        "high_fidelity": "true",
        "strong_inpaint": "false",
        "strong_inpaint_intensity": "0.00001",
        "prompt": "猫\n",
        "neg_prompt": "",
        "vector_switch": "true",
        "color_count": "5",
    }
    assert build_form_fields(VectorizeOptions(colors=16), DEFAULT_CATALOGUE) == {"color_count": "16"}
    assert build_form_fields(FaceEnhanceOptions(), DEFAULT_CATALOGUE) == {}
    assert build_form_fields(SeamlessOptions(fit=0.9), DEFAULT_CATALOGUE) == {"fit": "0.9"}


@pytest.mark.parametrize("code", [0, "0", 0.0, False, " 0 ", None, "ok", [], 0.5])
def test_accepted(code: object) -> None:
    # A task id without an error is accepted, whatever the type of the code: it may have been charged.
    assert parse_submit(err_code=code, task_id="t-1", remaining_count=5, remaining_money=300) == SubmitResult(
        outcome=ACCEPTED, upstream_id="t-1", balance=Balance(5, 30_000)
    )
    assert parse_submit(task_id="t-1").outcome is ACCEPTED


@pytest.mark.parametrize(
    ("task_id", "parsed"),
    [
        *(("a b", "a b"), (42, "42"), (7.0, "7"), (10**30, "1" + "0" * 30), ("任务", "任务")),
        *(("\tt-1\x00\r\n", "t-1"), ("x" * 256, "x" * 256)),
    ],
)
def test_task_ids(task_id: object, parsed: str) -> None:
    assert parse_submit(err_code=0, task_id=task_id).upstream_id == parsed


@pytest.mark.parametrize(
    "task_id", [None, "", "  ", 0, -1, "a\nb", "\x00", "x" * 257, True, 1.5, 1e20, 10**256, [], {}, ["t"], "\u202e"]
)
def test_success_without_a_usable_task_id(task_id: object) -> None:
    assert parse_submit(err_code=0, task_id=task_id) == SubmitResult(outcome=UNKNOWN)
    assert parse_submit(err_code=0, err_msg="任务提交失败:坏", task_id=task_id).outcome is UNKNOWN


@pytest.mark.parametrize("code", [1, "1", True, -1, 1.0])
def test_refused(code: object) -> None:
    for message, result in (
        ("账户剩余次数不足", SubmitResult(outcome=EXHAUSTED)),
        ("something else", SubmitResult(outcome=REJECTED, reason="something else")),
        (None, SubmitResult(outcome=REJECTED)),
        (7, SubmitResult(outcome=REJECTED)),
    ):
        assert parse_submit(err_code=code, err_msg=message) == result
    for message in (None, "账户剩余次数不足", "账户不存在", "任务提交失败:图片损坏"):  # may have been charged
        assert parse_submit(err_code=code, err_msg=message, task_id="t-1") == SubmitResult(outcome=UNKNOWN)


@pytest.mark.parametrize("task_id", [None, "", -1])
def test_refused_without_a_code(task_id: object) -> None:
    for code in ({}, {"err_code": None}, {"err_code": "?"}):
        assert parse_submit(**code, err_msg="账户不存在", task_id=task_id).outcome is INVALID


@pytest.mark.parametrize(
    "body",
    [
        *(TASK_TEXT.encode(charset) for charset in ("utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be")),
        gzip.compress(TASK_TEXT.encode("gbk"), mtime=0),
        *(zlib.compress(TASK_TEXT.encode(), wbits=wbits) for wbits in (zlib.MAX_WBITS, -zlib.MAX_WBITS)),
        TASK_TEXT.encode() + b"\x00",
    ],
)
def test_codings(body: bytes) -> None:
    assert parse_submit_response(body) == SubmitResult(outcome=ACCEPTED, upstream_id="任务", balance=Balance(4))


@pytest.mark.parametrize(
    "odd",
    [
        *(b'"remaining_money": NaN', b'"remaining_money": -Infinity', b'"remaining_money": 1e400'),
        *(b'"remaining_money": ' + b"9" * 10_000, b'"err_msg": "\\ud83d"', b'"err_msg": "a\nb\tc"'),
        *(b'"err_msg": "\xff"', b'"err_msg": "\xe9"', b'"err_msg": "caf\xe9\\""'),
    ],
)
def test_odd_fields(odd: bytes) -> None:
    task = b'"err_code": 0, "task_id": 12345678901234567890123, "remaining_count": 4'
    assert parse_submit_response(b"{%b, %b}" % (task, odd)) == SubmitResult(
        outcome=ACCEPTED, upstream_id="12345678901234567890123", balance=Balance(4)
    )
    assert parse_check_response(b'{"status": "Completed", "images_url": "http://x/y.png", %b, %b}' % (task, odd)) == (
        CheckResult(outcome=CheckOutcome.SUCCEEDED, artifacts=(IMAGE,), balance=Balance(4))
    )


@pytest.mark.parametrize(
    ("value", "count", "money"),
    [
        *((0, 0, 0), (5, 5, 500), (" 5 ", 5, 500), (5.0, 5, 500), ("5.00", 5, 500), (2**53, 2**53, None)),
        *((12.34, None, 1234), ("12.3", None, 1230), (99.80000000000001, None, 9980), ("99.7999999", None, 9980)),
        *((0.3 - 0.2 - 0.1, None, 0), (1.004, None, 100), (1.006, None, 101)),
        *((number, None, None) for number in (float("nan"), float("inf"), 2**53 + 1, 10**40, 1e300, -1, -0.5)),
        *((text, None, None) for text in ("-1", "1e3", "٣", "", "many")),
        *((True, None, None), (False, None, None), (None, None, None), ([5], None, None), ({}, None, None)),
    ],
)
def test_balances(value: object, count: int | None, money: int | None) -> None:
    # Taken only if it is an exact number: never guessed, never zero by default.
    figures = Balance(count, money)
    assert parse_submit(err_code=0, task_id="t", remaining_count=value, remaining_money=value).balance == figures
    assert parse_check(err_code=0, status="x", remaining_count=value, remaining_money=value).balance == figures


@pytest.mark.parametrize(
    "body", [b"", b"null", b"<html>502</html>", b'{"err_code": 0, "task_id": "t', b"[" * 60_000, b"1" * 60_000]
)
def test_unusable_bodies(body: bytes) -> None:
    assert parse_submit_response(body) == SubmitResult(outcome=SubmitOutcome.UNKNOWN)
    assert parse_check_response(body) == CheckResult(outcome=CheckOutcome.NO_RESPONSE)


def test_undecodable_ids() -> None:
    for task_id in (b"t\xff", b"\\ud800"):
        body = b'{"err_code": 0, "status": "Pending", "task_id": "%b"}' % task_id
        assert parse_submit_response(body) == SubmitResult(outcome=UNKNOWN)
        assert parse_check_response(body) == CheckResult(outcome=CheckOutcome.RUNNING)


def test_completed() -> None:
    urls = {"images_url": "http://x/y.png", "vector_url": "https://x:8/v.svg", "grid_url": "http://x/结果.png"}
    vector, grid = Artifact(ArtifactName.VECTOR, urls["vector_url"]), Artifact(ArtifactName.GRID, urls["grid_url"])
    for status in ("COMPLETED", " completed "):
        result = parse_check(err_code=0, status=status, remaining_count=1, remaining_money=2, **urls)
        assert result == CheckResult(
            outcome=CheckOutcome.SUCCEEDED, artifacts=(IMAGE, vector, grid), balance=Balance(1, 200)
        )


@pytest.mark.parametrize(
    ("value", "url"),
    [
        (["http://x/1.png", "http://x/2.png"], "http://x/1.png"),
        ([None, "ftp://x", " http://x/2.png "], "http://x/2.png"),
        *(("http://x/1.png,http://x/2.png", "http://x/1.png"), ("http://x/1,2.png", "http://x/1,2.png")),
        ("http://x/1.png\n,HTTPS://x/2.png", "http://x/1.png"),
        ("http://x/my pic.png?a=b c", "http://x/my%20pic.png?a=b%20c"),
        *(("http://x/a\r\n\tb.png", "http://x/ab.png"), (r"http:\\x\1.png?a=\b", r"http://x/1.png?a=\b")),
        *(("//x:8/1.png", "https://x:8/1.png"), ("/files/my pic.png", "https://api.example/files/my%20pic.png")),
        *(("x.png", "https://api.example/v/api/x.png"), (r"out\x.png", "https://api.example/v/api/out/x.png")),
        ("../out/x", "https://api.example/v/out/x"),
        ({"name": "http.png", "src": "/f/1.png"}, "https://api.example/f/1.png"),
        ([{"file": None}, {"file": {"href": "//x/1.png"}}], "https://x/1.png"),
    ],
)
def test_artifact_urls(value: object, url: str) -> None:
    assert parse_check(err_code=0, status="completed", images_url=value).artifacts == (
        Artifact(ArtifactName.IMAGE, url),
    )


@pytest.mark.parametrize(
    "url",
    [
        *(None, "", "ftp://x/y.png", "javascript:alert(1.png)", "http://", "http://[x", "http://a b/", 5, [], {}),
        *("http://x/" + "y" * 2_048, "http://x/\x00", "http://x:99999/", {"url": "x"}, "///", "null"),
        *("Generation failed.", "生成失败", "C:\\out\\x.png", [[[[["http://x/y"]]]]]),
    ],
)
def test_finished_without_artifacts(url: object) -> None:
    # It is not ended yet, since an end is final.
    assert parse_check(err_code=0, status="Completed", images_url=url, remaining_count=1) == CheckResult(
        outcome=CheckOutcome.INVALID, balance=Balance(1)
    )


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        *(({"err_code": 0, "status": text}, CheckOutcome.RUNNING) for text in ("Pending", "排队中", "canceled")),
        *(({"err_code": 0, "status": text}, CheckOutcome.NOT_FOUND) for text in (None, " ")),
        ({"err_code": 0}, CheckOutcome.NOT_FOUND),
        ({"err_code": 1, "err_msg": "错误:任务未找到或状态未知"}, CheckOutcome.NOT_FOUND),
        ({"err_code": "1", "err_msg": " 任务未找到或状态未知！"}, CheckOutcome.NOT_FOUND),
        ({"err_code": 1, "err_msg": "账户不存在"}, CheckOutcome.INVALID),
        ({"err_code": 1, "err_msg": "boom", "status": "completed", "images_url": "http://x/y"}, CheckOutcome.INVALID),
        ({"err_msg": "boom", "status": "failed"}, CheckOutcome.INVALID),
        ({"err_code": "?"}, CheckOutcome.INVALID),
        *(({"err_code": 0, "status": odd}, CheckOutcome.INVALID) for odd in (5, ["completed"], True)),
    ],
)
def test_unfinished(answer: dict[str, Any], outcome: CheckOutcome) -> None:
    assert parse_check(**answer) == CheckResult(outcome=outcome)


texts = st.text(max_size=40)
names = st.sampled_from(["err_code", "err_msg", "task_id", "status", "images_url", "remaining_money"])
words = st.sampled_from(
    ["0", "1", "completed", "FAILED", "http://x/y.png", "账户不存在", "任务提交失败：坏", "5.0", "-1", "\x00"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | words
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
answers = st.dictionaries(names, values) | values


@given(answers)
@example({"err_code": 0, "task_id": "t", "remaining_money": float("1e308")})
def test_any_json(answer: Any) -> None:
    body = json.dumps(answer).encode()
    submitted, checked = parse_submit_response(body), parse_check_response(body)
    assert (submitted.outcome is SubmitOutcome.ACCEPTED) == bool(submitted.upstream_id)
    assert submitted.upstream_id.isprintable()
    assert len(submitted.upstream_id) <= 256
    assert submitted.reason.isprintable()
    assert len(submitted.reason) <= 500
    assert (checked.outcome is CheckOutcome.SUCCEEDED) == bool(checked.artifacts)
    assert (checked.outcome is CheckOutcome.FAILED) == bool(checked.error)
    assert all(artifact.url.lower().startswith(("http://", "https://")) for artifact in checked.artifacts)
    for figures in (submitted.balance, checked.balance):
        assert all(0 <= figure <= 2**53 for figure in (figures.count, figures.money_fen) if figure is not None)


PRIVATE_MESSAGES = [
    *(None, "账户剩余次数不足", "账户不存在的图片", "处理失败:账户余额仅剩3元", "insufficient balance", "bad user_key"),
    "HTTPConnectionPool(host='10.1.2.3', port=8188): Max retries exceeded … Traceback (most recent call last)",
    *("Traceback (most recent call last): File x", "no answer on port 8188", "KeyError: 'steps'"),
    *("[Errno 111] refused", "<class Foo>", "10.1.2.3", "[::1]:8188", "/data/x.png"),
]
"""Messages about the account, or of which nothing remains without internals."""

PARTS = {
    "坏\x00了": "坏 了",
    "图片损坏10.1.2.3处理": "图片损坏…处理",
    "at fe80::1:2%eth0 now": "at … now",
    r"can't open C:\models\x now": "can't open … now",
    "打开../models/a失败": "打开…失败",
    "from ftp://x/y and REDIS://z": "from … and …",
    "支持 JPEG/PNG/WEBP,1.5 MB": "支持 JPEG/PNG/WEBP,1.5 MB",
    "参数steps超出范围(20-40)": "参数steps超出范围(20-40)",
    "a\x00b\n\tc\u202e": "a b c",
    "长" * 600: "长" * 500,
}
"""Messages, and what tenants see of them."""


@pytest.mark.parametrize(("message", "shown"), [*((text, "") for text in PRIVATE_MESSAGES), *PARTS.items()])
def test_what_tenants_see_of_a_message(message: str | None, shown: str) -> None:
    assert parse_submit(err_code=1, err_msg=message).reason == shown
    detail = f"The upstream could not process this task: {shown}" if shown else "The upstream gave no reason."
    failed = CheckResult(outcome=CheckOutcome.FAILED, error=TaskError("task-failed", detail), balance=Balance(4))
    assert parse_check(err_code=0, status="Failed", err_msg=message, remaining_count=4) == failed


@pytest.mark.parametrize("prefix", ["", "错误:", "任务提交失败: 错误:", "Error: "])
@pytest.mark.parametrize("end", ["", ",请联系客服"])
@pytest.mark.parametrize(
    ("words", "outcome"),
    [("账户不存在", INVALID), ("账号不存在", INVALID), ("账户剩余次数不足", EXHAUSTED), ("余额不足", EXHAUSTED)],
)
def test_closing(prefix: str, words: str, end: str, outcome: SubmitOutcome) -> None:
    assert parse_submit(err_code=1, err_msg=prefix + words + end) == SubmitResult(outcome=outcome)
    assert parse_submit(err_code=1, err_msg=f"{prefix}图片所属{words}的图片").outcome is REJECTED


def test_english() -> None:
    for reason in ("图片文件已损坏", "参数steps超出范围(20-40)"):
        english = parse_submit(err_code=1, err_msg=f"任务提交失败:{reason}").reason_en
        assert english
        assert english.isascii()
    assert parse_submit(err_code=1, err_msg="任务提交失败:天气不好").reason_en is None
