"""The vendor's calls, as documented by the vendor."""

from __future__ import annotations

import asyncio
import sys

import pytest

from service.sandbox import forms
from service.sandbox.app import RunningSandbox
from service.sandbox.faults import Behaviour, Fault, Kind
from service.sandbox.store import AccountBalance
from tests.sandbox import images
from tests.sandbox.client import UPSCALE, SandboxClient

SUBMITS: dict[str, Kind] = {
    "submit_task": "upscale",
    "submit_vector_task": "vector",
    "submit_face_enhance_task": "face",
    "submit_seamless_task": "seamless",
}


@pytest.mark.parametrize("call", SUBMITS)
async def test_submit_returns_id_and_balance(client: SandboxClient, call: str) -> None:
    response = await client.submit(call)
    answer = response.json()
    assert response.status_code == 200
    assert isinstance(answer.pop("task_id"), str)
    assert answer == {"err_code": 0, "remaining_count": 2, "remaining_money": 10}


@pytest.mark.parametrize(
    ("call", "fields", "urls"),
    [
        ("submit_task", {}, {"images_url"}),
        ("submit_task", {"vector_switch": "true"}, {"images_url", "vector_url"}),
        ("submit_vector_task", {}, {"images_url", "vector_url"}),
        ("submit_face_enhance_task", {}, {"images_url"}),
        ("submit_seamless_task", {}, {"images_url", "grid_url"}),
    ],
)
async def test_finished_task_has_its_own_results(
    sandbox: RunningSandbox, client: SandboxClient, call: str, fields: dict[str, str], urls: set[str]
) -> None:
    """A finished task has absolute URLs of its kind's results, and the balance."""
    task_id = await client.submit_accepted(call, fields)
    await sandbox.control.wait_until_idle()
    answer = await client.check(task_id)
    result_urls = {name: answer.pop(name) for name in list(answer) if name.endswith("_url")}
    assert set(result_urls) == urls
    assert all(url.startswith(f"{sandbox.url}/") for url in result_urls.values())
    assert answer == {"err_code": 0, "status": "Completed", "remaining_count": 2, "remaining_money": 10}


async def test_running_task_has_a_state_only(sandbox: RunningSandbox, client: SandboxClient) -> None:
    await sandbox.control.set_behaviour(Behaviour(seconds=3600))
    answer = await client.check(await client.submit_accepted())
    assert answer.pop("status") in {"Pending", "Processing"}
    assert answer == {"err_code": 0}


async def test_task_durations(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A task takes the duration set when it was submitted; later, shorter ones overtake it."""
    await sandbox.control.set_account("key", AccountBalance(9, 0))
    await sandbox.control.set_behaviour(Behaviour(seconds=3600))
    waiting = [await client.submit_accepted() for _ in range(4)]
    await sandbox.control.set_behaviour(Behaviour(seconds=0))
    quick = await client.submit_accepted()
    async with asyncio.timeout(30):
        while (await client.check(quick))["status"] != "Completed":
            pass
    assert {(await client.check(task_id))["status"] for task_id in waiting} == {"Processing"}


async def test_failed_task_has_a_state_only(sandbox: RunningSandbox, client: SandboxClient) -> None:
    task_id = await client.submit_accepted(image=images.plain_png(400, 400)[:100])
    await sandbox.control.wait_until_idle()
    assert await client.check(task_id) == {"err_code": 0, "status": "Failed"}


async def test_check_accepts_multipart(sandbox: RunningSandbox, client: SandboxClient) -> None:
    task_id = await client.submit_accepted()
    await sandbox.control.wait_until_idle()
    parts = {"user_key": (None, b"key"), "task_id": (None, task_id.encode())}
    response = await client.http.post("/api/check_task_status", files=parts)
    assert response.json()["status"] == "Completed"


async def test_unknown_account(client: SandboxClient) -> None:
    """Every call with an unknown account is refused with the vendor's message."""
    refused = {"err_code": 1, "err_msg": "账户不存在"}
    assert (await client.submit(user_key="unknown")).json() == refused
    assert await client.check("1", user_key="unknown") == refused
    assert (await client.http.post("/api/check_task_status")).json() == refused


async def test_task_of_another_account_is_unknown(client: SandboxClient) -> None:
    unknown = {"err_code": 1, "err_msg": "任务未找到或状态未知"}
    task_id = await client.submit_accepted(user_key="other")
    assert await client.check(task_id) == unknown
    assert await client.check("1") == unknown


@pytest.mark.parametrize("call", SUBMITS)
async def test_prepaid_uses_go_before_money(sandbox: RunningSandbox, client: SandboxClient, call: str) -> None:
    """Prepaid uses are charged first, then the price of the kind, then the account is refused."""
    await sandbox.control.set_behaviour(Behaviour(prices={SUBMITS[call]: 4}))
    await sandbox.control.set_account("key", AccountBalance(1, 7))
    answers = [(await client.submit(call)).json() for _ in range(3)]
    figures = [(answer.get("remaining_count"), answer.get("remaining_money")) for answer in answers]
    assert figures == [(0, 7), (0, 3), (None, None)]
    assert answers[-1] == {"err_code": 1, "err_msg": "账户剩余次数不足"}
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(0, 3)


async def test_nothing_is_spent_twice(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """Concurrent submits are accepted exactly as far as the balance goes."""
    await sandbox.control.set_account("key", AccountBalance(3, 4))
    answers = [answer.json() for answer in await asyncio.gather(*(client.submit() for _ in range(20)))]
    accepted = [answer for answer in answers if answer["err_code"] == 0]
    assert sorted((answer["remaining_count"], answer["remaining_money"]) for answer in accepted) == [
        *((0, money) for money in range(5)),
        *((count, 4) for count in (1, 2)),
    ]
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(0, 0)


async def test_error_fails_the_task(
    sandbox: RunningSandbox, client: SandboxClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A task whose operation raises ends as failed, and the error is logged."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    task_id = await client.submit_accepted("submit_vector_task")
    await sandbox.control.wait_until_idle()
    assert (await client.check(task_id))["status"] == "Failed"
    assert "/bin/false" in caplog.text


async def test_failed_task_stays_charged(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A task charged at submit is not refunded when it fails."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(fail="内部错误"),)))
    task_id = await client.submit_accepted()
    await sandbox.control.wait_until_idle()
    assert (await client.check(task_id))["status"] == "Failed"
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(2, 10)


@pytest.mark.parametrize(
    ("call", "field", "value"),
    [
        ("submit_task", "upscale", "0.9"),
        ("submit_task", "upscale", "8.1"),
        ("submit_task", "upscale", "nan"),
        ("submit_task", "s_noise", "1.2"),
        ("submit_task", "steps", "19"),
        ("submit_task", "steps", "many"),
        ("submit_task", "strong_inpaint_intensity", "1.1"),
        ("submit_task", "high_fidelity", "perhaps"),
        ("submit_task", "color_count", "17"),
        ("submit_vector_task", "color_count", "1"),
        ("submit_vector_task", "color_count", "4.5"),
        ("submit_seamless_task", "fit", "0.95"),
        ("submit_seamless_task", "fit", ""),
    ],
)
async def test_field_out_of_range_is_rejected(
    sandbox: RunningSandbox, client: SandboxClient, call: str, field: str, value: str
) -> None:
    """A field out of range is named in the rejection, and costs nothing."""
    answer = (await client.submit(call, {field: value})).json()
    assert answer["err_code"] == 1
    assert answer["err_msg"].startswith(f"任务提交失败:参数{field}")
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(3, 10)


@pytest.mark.parametrize("name", UPSCALE)
async def test_field_without_default_is_required(client: SandboxClient, name: str) -> None:
    fields = {"user_key": "key", **UPSCALE}
    del fields[name]
    response = await client.http.post("/api/submit_task", data=fields, files={"input_image": images.plain_png()})
    assert response.json() == {"err_code": 1, "err_msg": f"任务提交失败:缺少参数{name}"}


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"GIF89a\xff\xff\xff\xff\x00",
        b"<svg/>",
        images.png_claiming_size(6000, 5000),
        images.png_claiming_size(30000, 30000),
    ],
)
async def test_invalid_image_is_rejected(sandbox: RunningSandbox, client: SandboxClient, image: bytes) -> None:
    """Empty files, files of other types and images with too many pixels are rejected and cost nothing."""
    answer = (await client.submit(image=image)).json()
    assert answer["err_code"] == 1
    assert answer["err_msg"].startswith("任务提交失败:图片") or answer["err_msg"] == "任务提交失败:无法识别的图片格式"
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(3, 10)


async def test_submit_without_a_file_is_rejected(client: SandboxClient) -> None:
    missing = {"err_code": 1, "err_msg": "任务提交失败:缺少参数input_image"}
    response = await client.http.post("/api/submit_seamless_task", data={"user_key": "key"})
    assert response.json() == missing
    response = await client.http.post("/api/submit_seamless_task", files={"user_key": (None, b"key")})
    assert response.json() == missing


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("multipart/form-data; boundary=b", b"--b\r\nnonsense", "账户不存在"),
        ("multipart/form-data", b"", "账户不存在"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="user_key"\r\n\r\nkey\r\n--b\r\nnonsense',
            "任务提交失败:请求格式错误或文件过大",
        ),
        ("application/json", b'{"user_key": "key"}', "账户不存在"),
        ("application/x-www-form-urlencoded", b"user_key=\xff", "账户不存在"),
        ("application/x-www-form-urlencoded", b"user_key=key&x=" + b"x" * 300_000, "账户不存在"),
    ],
)
async def test_malformed_body_is_refused(client: SandboxClient, content_type: str, body: bytes, message: str) -> None:
    """A malformed form gets status 200 and an error message, as the vendor responds."""
    response = await client.http.post("/api/submit_seamless_task", content=body, headers={"content-type": content_type})
    assert response.status_code == 200
    assert response.json() == {"err_code": 1, "err_msg": message}


async def test_overlong_text_is_rejected(client: SandboxClient) -> None:
    answer = (await client.submit("submit_task", {"prompt": "x" * 300_000})).json()
    assert answer == {"err_code": 1, "err_msg": "任务提交失败:请求内容过大"}


async def test_overlong_file_is_rejected(client: SandboxClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file above the limit is rejected, and the request record names its account."""
    monkeypatch.setattr(forms, "MAX_FILE_BYTES", 1_000)
    answer = (await client.submit(image=bytes(1_001))).json()
    assert answer == {"err_code": 1, "err_msg": "任务提交失败:请求格式错误或文件过大"}


async def test_other_routes_do_not_exist(client: SandboxClient) -> None:
    """Other paths get 404, and other methods 405."""
    assert (await client.http.get("/")).status_code == 404
    assert (await client.http.post("/api/cancel_task")).status_code == 404
    assert (await client.http.get("/api/submit_task")).status_code == 405
