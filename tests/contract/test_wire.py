"""The vendor's wire: what goes into the forms, and what is made of any answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.clients.wire import read_check, read_submit, to_fields
from service.domain.balance import Figures
from service.domain.reasons import in_english
from service.domain.task import (
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
from service.usecases.ports import Answered, Check, SubmitOutcome, Submitted

ACCEPTED, REJECTED, UNKNOWN = SubmitOutcome.ACCEPTED, SubmitOutcome.REJECTED, SubmitOutcome.UNKNOWN
EXHAUSTED, INVALID = SubmitOutcome.EXHAUSTED, SubmitOutcome.INVALID_ACCOUNT

texts = st.text(max_size=40)
names = st.sampled_from(
    [
        *("err_code", "err_msg", "task_id", "status", "images_url", "vector_url", "grid_url"),
        *("remaining_count", "remaining_money"),
    ]
)
words = st.sampled_from(
    [
        *("0", "1", "completed", "FAILED", "http://x/y.png", "账户不存在", "账户剩余次数不足", "任务提交失败:"),
        *("任务提交失败：坏", "任务未找到或状态未知", "5", "5.0", "-1", "1e9", "t-1", "\x00", "http://[", "٣"),
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | words
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
answers = st.dictionaries(names, values) | values


def submit(**answer: Any) -> Submitted:
    return read_submit(json.dumps(answer).encode())


def check(**answer: Any) -> Check:
    return read_check(json.dumps(answer).encode())


def test_upscale_fields() -> None:
    """Every option of an upscale has its field, in the vendor's words and spelling."""
    assert to_fields(UpscaleOptions(), DEFAULT_CATALOGUE) == {
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


def test_chosen_fields() -> None:
    """What was chosen is what is sent."""
    catalogue = Catalogue(models={"general": "通用模型", "anime": "动漫"}, styles={"general": "通用风格"})
    options = UpscaleOptions(
        model="anime", style="gone", steps=20, high_fidelity=True, inpaint_strength=1e-05, prompt="猫\n", vector=True
    )
    fields = to_fields(options, catalogue)
    assert fields["sdxl_model_dropdown"] == "动漫"
    assert fields["style_dropdown"] == "gone"
    assert fields["steps"] == "20"
    assert fields["high_fidelity"] == fields["vector_switch"] == "true"
    assert fields["strong_inpaint_intensity"] == "0.00001"
    assert fields["prompt"] == "猫\n"


def test_other_fields() -> None:
    """The other kinds have the fields that the vendor names, and no more."""
    assert to_fields(VectorizeOptions(colors=16), DEFAULT_CATALOGUE) == {"color_count": "16"}
    assert to_fields(FaceEnhanceOptions(), DEFAULT_CATALOGUE) == {}
    assert to_fields(SeamlessOptions(fit=0.9), DEFAULT_CATALOGUE) == {"fit": "0.9"}


@pytest.mark.parametrize("code", [0, "0", 0.0, "0.0", False, " 0 "])
def test_accepted(code: object) -> None:
    """A success with a task id is accepted, in whatever type its code comes."""
    assert submit(err_code=code, task_id="t-1", remaining_count=5, remaining_money=300) == Submitted(
        outcome=ACCEPTED, upstream_id="t-1", figures=Figures(5, 30_000)
    )


@pytest.mark.parametrize("code", [None, "ok", [], 0.5, {}])
def test_task_id_without_a_code(code: object) -> None:
    """A task id is believed where no error is declared: it is all that is left of a task that was paid for."""
    assert submit(err_code=code, task_id="t-1").upstream_id == "t-1"
    assert submit(task_id="t-1").outcome is ACCEPTED


@pytest.mark.parametrize(("task_id", "found"), [("a b", "a b"), (42, "42"), ("任务", "任务"), ("x" * 256, "x" * 256)])
def test_task_ids(task_id: object, found: str) -> None:
    """A task id is any short printable text, or a number."""
    assert submit(err_code=0, task_id=task_id).upstream_id == found


@pytest.mark.parametrize(
    "task_id", [None, "", "  ", "a\nb", "\x00", "x" * 257, True, 1.5, [], {}, ["t"], 1 << 65, "\u202e"]
)
def test_success_without_a_usable_task_id(task_id: object) -> None:
    """A success whose task id can't be used may have been charged."""
    assert submit(err_code=0, task_id=task_id) == Submitted(outcome=UNKNOWN)
    assert submit(err_code=0, err_msg="任务提交失败:坏", task_id=task_id).outcome is UNKNOWN


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
    """An error is a refusal by its message, of which nothing about the balance or an address is passed on."""
    assert submit(err_code=code, err_msg=message) == Submitted(outcome=outcome, reason=reason)


def test_message_without_a_code() -> None:
    """A message stands for an error where no code says otherwise."""
    assert submit(err_msg="账户不存在").outcome is INVALID
    assert submit(err_code="?", err_msg="任务提交失败:坏") == Submitted(outcome=REJECTED, reason="坏")


def test_contradiction() -> None:
    """An error without a message, beside a task id, may have been charged."""
    assert submit(err_code=1, task_id="t-1").outcome is UNKNOWN


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"<html>502</html>",
        b'{"err_code": 0, "task_id": "t',
        b'{"err_code": 0, "task_id": "\xff"}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"1" * 60_000,
        b"\x1f\x8b\x08",
        b'{"err_code": 0, "task_id": "\\ud800"}',
    ],
)
def test_unusable_bodies(body: bytes) -> None:
    """What is no JSON object says nothing, whatever it is."""
    assert read_submit(body) == Submitted(outcome=UNKNOWN)
    assert read_check(body) == Check(answered=Answered.NOTHING)


def test_byte_order_mark() -> None:
    """A byte order mark before the JSON does no harm."""
    assert read_submit(b'\xef\xbb\xbf {"err_code": 0, "task_id": "t"}').outcome is ACCEPTED


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
        (1.005, None, None),
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
def test_figures(value: object, count: int | None, money: int | None) -> None:
    """A figure is taken only if it is exactly one: never guessed, and never zero for want of better."""
    figures = Figures(count, money)
    assert submit(err_code=0, task_id="t", remaining_count=value, remaining_money=value).figures == figures
    assert check(err_code=0, status="x", remaining_count=value, remaining_money=value).figures == figures


@pytest.mark.parametrize("status", ["Completed", "COMPLETED", "completed", " completed "])
def test_completed(status: str) -> None:
    """A finished task has the results it names, and the figures."""
    assert check(
        err_code=0,
        status=status,
        images_url="http://x/image.png",
        vector_url="https://x:8/v.svg",
        grid_url="http://x/结果.png",
        remaining_count=1,
        remaining_money=2,
    ) == Check(
        answered=Answered.SUCCEEDED,
        artifacts=(
            Artifact(ArtifactName.IMAGE, "http://x/image.png"),
            Artifact(ArtifactName.VECTOR, "https://x:8/v.svg"),
            Artifact(ArtifactName.GRID, "http://x/结果.png"),
        ),
        figures=Figures(1, 200),
    )


@pytest.mark.parametrize(
    ("value", "url"),
    [
        (["http://x/1.png", "http://x/2.png"], "http://x/1.png"),
        ([None, "ftp://x", " http://x/2.png "], "http://x/2.png"),
        ("http://x/1.png,http://x/2.png", "http://x/1.png"),
        ("http://x/1,2.png", "http://x/1,2.png"),
        (" http://x/1.png\n", "http://x/1.png"),
        ("HTTP://x/1.png", "HTTP://x/1.png"),
    ],
)
def test_result_addresses(value: object, url: str) -> None:
    """The first usable address is taken, whether one comes or several."""
    assert check(err_code=0, status="completed", images_url=value).artifacts == (Artifact(ArtifactName.IMAGE, url),)


@pytest.mark.parametrize(
    "url",
    [
        *(None, "", "x.png", "/files/x.png", "ftp://x/y", "javascript:alert(1)", "http://", "http://[x", 5, [], [[]]),
        *("http://x/" + "y" * 2_048, "http://x/a b", "http://x/\x00", "http://x:99999/", "http://x:0/", {"url": "x"}),
    ],
)
def test_finished_without_results(url: object) -> None:
    """A finished task whose results can't be had is not taken for finished yet, since an end is never undone."""
    assert check(err_code=0, status="Completed", images_url=url, remaining_count=1).answered is Answered.NOTHING


def test_failed() -> None:
    """A failed task says why, as far as anybody does."""
    assert check(err_code=0, status="Failed", remaining_count=4) == Check(
        answered=Answered.FAILED, error=TaskError("task-failed", "The upstream gave no reason."), figures=Figures(4)
    )
    error = check(err_code=0, status="FAILED", err_msg="坏\x00了").error
    assert error == TaskError("task-failed", "The upstream could not carry out this task: 坏 了")


@pytest.mark.parametrize("status", ["Pending", "processing", "排队中", "canceled", "complete"])
def test_unnamed_states(status: str) -> None:
    """A state that the vendor does not name means that the task still runs."""
    assert check(err_code=0, status=status) == Check(answered=Answered.RUNNING)


def test_silence() -> None:
    """A null, empty or missing state says nothing of the task, and neither does an unknown one."""
    for answer in ({"err_code": 0}, {"err_code": 0, "status": None}, {"status": ""}, {"err_code": 0, "status": " "}):
        assert check(**answer) == Check(answered=Answered.SILENT)
    assert check(err_code=1, err_msg="任务未找到或状态未知") == Check(answered=Answered.SILENT)
    assert check(err_code="1", err_msg=" 任务未找到或状态未知！") == Check(answered=Answered.SILENT)


@pytest.mark.parametrize(
    "answer",
    [
        {"err_code": 1, "err_msg": "账户不存在"},
        {"err_code": 1, "err_msg": "boom", "status": "completed", "images_url": "http://x/y"},
        {"err_code": 1},
        {"err_msg": "boom", "status": "failed"},
        {"err_code": "?"},
        {"err_code": 0, "status": 5},
        {"err_code": 0, "status": ["completed"]},
        {"err_code": 0, "status": True},
    ],
)
def test_unusable_checks(answer: dict[str, Any]) -> None:
    """An error, or a state that is none, is no answer about the task."""
    assert check(**answer) == Check(answered=Answered.NOTHING)


@given(answers)
@example({"err_code": 0, "task_id": "t", "remaining_money": float("1e308")})
def test_any_answer(answer: Any) -> None:
    """Any JSON is read without an error, and all that is taken from it is within its bounds."""
    body = json.dumps(answer).encode()
    submitted, checked = read_submit(body), read_check(body)
    assert (submitted.outcome is ACCEPTED) == bool(submitted.upstream_id)
    assert submitted.upstream_id.isprintable()
    assert len(submitted.upstream_id) <= 256
    assert submitted.reason.isprintable()
    assert len(submitted.reason) <= 500
    assert (checked.answered is Answered.SUCCEEDED) == bool(checked.artifacts)
    assert (checked.answered is Answered.FAILED) == bool(checked.error)
    assert all(artifact.url.lower().startswith(("http://", "https://")) for artifact in checked.artifacts)
    for figures in (submitted.figures, checked.figures):
        assert all(0 <= figure <= 2**53 for figure in (figures.count, figures.money) if figure is not None)


@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    """Any bytes are read without an error, and are no success."""
    assert read_submit(body).outcome is not ACCEPTED
    assert read_check(body).answered in {Answered.NOTHING, Answered.SILENT, Answered.RUNNING}


@pytest.mark.parametrize("reason", ["图片文件已损坏", "无法识别的图片格式", "参数steps超出范围(20-40)", "账户不存在"])
def test_english(reason: str) -> None:
    """Reasons that are known are told in English too."""
    english = in_english(reason)
    assert english
    assert english.isascii()


def test_no_english() -> None:
    """A reason that is not known is left in its own words."""
    assert in_english("天气不好") is None
