"""The vendor's API: parsing of checks, and of arbitrary input."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.clients.vendor_api import parse_check_response, parse_submit_response
from service.domain.ledger import Balance
from service.domain.tasks import Artifact, ArtifactName, TaskError
from service.usecases.ports import CheckOutcome, CheckResult, SubmitOutcome, SubmitResult

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
BASE = "https://api.example/v/api/check_task_status"


def parse_check(**answer: Any) -> CheckResult:
    return parse_check_response(json.dumps(answer).encode(), BASE)


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
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"1" * 60_000,
        b"\x1f\x8b\x08",
    ],
)
def test_unusable_bodies(body: bytes) -> None:
    assert parse_submit_response(body) == SubmitResult(outcome=SubmitOutcome.UNKNOWN)
    assert parse_check_response(body) == CheckResult(outcome=CheckOutcome.NO_RESPONSE)


@pytest.mark.parametrize("task_id", [b"\xff", b"t\xff", b"\\ud800"])
def test_undecodable_ids(task_id: bytes) -> None:
    body = b'{"err_code": 0, "status": "Pending", "task_id": "%b"}' % task_id
    assert parse_submit_response(body) == SubmitResult(outcome=SubmitOutcome.UNKNOWN)
    assert parse_check_response(body) == CheckResult(outcome=CheckOutcome.RUNNING)


@pytest.mark.parametrize("odd", [b"NaN", b"-Infinity", b'"\\ud83d"', b'"\xd5\xcb"', b'"a\nb"'])
def test_odd_fields(odd: bytes) -> None:
    """A malformed field does not keep a task from ending."""
    body = b'{"err_code": 0, "status": "Completed", "images_url": "http://x/y.png", "remaining_count": %b}' % odd
    assert parse_check_response(body) == CheckResult(
        outcome=CheckOutcome.SUCCEEDED, artifacts=(Artifact(ArtifactName.IMAGE, "http://x/y.png"),)
    )


@pytest.mark.parametrize("status", ["Completed", "COMPLETED", "completed", " completed "])
def test_completed(status: str) -> None:
    assert parse_check(
        err_code=0,
        status=status,
        images_url="http://x/image.png",
        vector_url="https://x:8/v.svg",
        grid_url="http://x/结果.png",
        remaining_count=1,
        remaining_money=2,
    ) == CheckResult(
        outcome=CheckOutcome.SUCCEEDED,
        artifacts=(
            Artifact(ArtifactName.IMAGE, "http://x/image.png"),
            Artifact(ArtifactName.VECTOR, "https://x:8/v.svg"),
            Artifact(ArtifactName.GRID, "http://x/结果.png"),
        ),
        balance=Balance(1, 200),
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
        ("http://x/1.png http://x/2.png", "http://x/1.png"),
        ("http://x/1.png\n,HTTPS://x/2.png", "http://x/1.png"),
        ("http://x/my pic.png?a=b c", "http://x/my%20pic.png?a=b%20c"),
        ("http://x/a\r\n\tb.png", "http://x/ab.png"),
        (r"http:\\x\1.png?a=\b", r"http://x/1.png?a=\b"),
        ("//x:8/1.png", "https://x:8/1.png"),
        ("/files/my pic.png", "https://api.example/files/my%20pic.png"),
        ("x.png", "https://api.example/v/api/x.png"),
        ("./x.png?v=1", "https://api.example/v/api/x.png?v=1"),
        ("../out/x", "https://api.example/v/out/x"),
        (r"out\x.png", "https://api.example/v/api/out/x.png"),
        ("files/0a1b2c", "https://api.example/v/api/files/0a1b2c"),
        ({"url": "http://x/1.png"}, "http://x/1.png"),
        ({"name": "http.png", "src": "/f/1.png"}, "https://api.example/f/1.png"),
        ({"name": "1.png", "where": "http://x/1.png"}, "http://x/1.png"),
        ([{"file": None}, {"file": {"href": "//x/1.png"}}], "https://x/1.png"),
    ],
)
def test_artifact_urls(value: object, url: str) -> None:
    """The first usable URL is taken, whether one is given or several."""
    assert parse_check(err_code=0, status="completed", images_url=value).artifacts == (
        Artifact(ArtifactName.IMAGE, url),
    )


@pytest.mark.parametrize(
    "url",
    [
        *(None, "", "ftp://x/y.png", "javascript:alert(1.png)", "http://", "http://[x", "http://a b/", 5, [], [[]], {}),
        *("http://x/" + "y" * 2_048, "http://x/\x00", "http://x:99999/", "http://x:0/", {"url": "x"}, "///", "//"),
        *("null", "None", "N/A", "pending", "Generation failed.", "生成失败", "C:\\out\\x.png", [[[[["http://x/y"]]]]]),
    ],
)
def test_finished_without_artifacts(url: object) -> None:
    """A finished task without usable artifacts is not ended yet, since an end is final."""
    assert parse_check(err_code=0, status="Completed", images_url=url, remaining_count=1) == CheckResult(
        outcome=CheckOutcome.INVALID, balance=Balance(1)
    )


def test_failed() -> None:
    assert parse_check(err_code=0, status="Failed", remaining_count=4) == CheckResult(
        outcome=CheckOutcome.FAILED, error=TaskError("task-failed", "The upstream gave no reason."), balance=Balance(4)
    )
    error = parse_check(err_code=0, status="FAILED", err_msg="坏\x00了").error
    assert error == TaskError("task-failed", "The upstream could not process this task: 坏 了")


@pytest.mark.parametrize("status", ["Pending", "processing", "排队中", "canceled", "complete"])
def test_unnamed_states(status: str) -> None:
    """A state outside the vendor's document means that the task is running."""
    assert parse_check(err_code=0, status=status) == CheckResult(outcome=CheckOutcome.RUNNING)


def test_no_state() -> None:
    """A null, empty, missing or unknown state is no information about the task."""
    for answer in ({"err_code": 0}, {"err_code": 0, "status": None}, {"status": ""}, {"err_code": 0, "status": " "}):
        assert parse_check(**answer) == CheckResult(outcome=CheckOutcome.NOT_FOUND)
    assert parse_check(err_code=1, err_msg="任务未找到或状态未知") == CheckResult(outcome=CheckOutcome.NOT_FOUND)
    assert parse_check(err_code=1, err_msg="错误:任务未找到或状态未知") == CheckResult(outcome=CheckOutcome.NOT_FOUND)
    assert parse_check(err_code="1", err_msg=" 任务未找到或状态未知！") == CheckResult(outcome=CheckOutcome.NOT_FOUND)


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
    """An error, or a malformed state, is an invalid answer."""
    assert parse_check(**answer) == CheckResult(outcome=CheckOutcome.INVALID)


@given(answers)
@example({"err_code": 0, "task_id": "t", "remaining_money": float("1e308")})
def test_any_json(answer: Any) -> None:
    """Any JSON is parsed without an exception, into values within their bounds."""
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


@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    """Any bytes are parsed without an exception, and are no success."""
    assert parse_submit_response(body).outcome is not SubmitOutcome.ACCEPTED
    assert parse_check_response(body).outcome not in {CheckOutcome.SUCCEEDED, CheckOutcome.FAILED}
