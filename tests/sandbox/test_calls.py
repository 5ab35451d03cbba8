"""The vendor's calls and files, as documented by the vendor."""

from __future__ import annotations

import asyncio
import sys

import pytest

from service.sandbox import forms
from service.sandbox.app import RunningSandbox
from service.sandbox.faults import Behaviour, Fault, Kind
from service.sandbox.store import AccountBalance
from tests.sandbox.conftest import ACCOUNTS, UPSCALE, SandboxClient
from tests.support.images import make_png, png_claiming_size

USER_KEY_PART = b'--b\r\nContent-Disposition: form-data; name="user_key"\r\n\r\nkey\r\n--b\r\n'
TASKS: list[tuple[str, dict[str, str], set[str], tuple[int, int]]] = [
    ("submit_task", {}, {"images_url"}, (0, 16)),
    ("submit_task", {"vector_switch": "true"}, {"images_url", "vector_url"}, (0, 12)),
    ("submit_vector_task", {}, {"images_url", "vector_url"}, (0, 9)),
    ("submit_face_enhance_task", {}, {"images_url"}, (0, 7)),
    ("submit_seamless_task", {}, {"images_url", "grid_url"}, (0, 2)),
]
"""A call, its fields, the URLs of its results, and the balance afterwards: prepaid uses go before money."""


async def test_tasks_cost_their_price_and_have_results(sandbox: RunningSandbox, client: SandboxClient) -> None:
    prices: dict[Kind, int] = {"upscale": 4, "vector": 3, "face": 2, "seamless": 5}
    await sandbox.control.set_behaviour(Behaviour(prices=prices))
    await sandbox.control.set_account("key", AccountBalance(1, 16))
    tasks: dict[str, set[str]] = {}
    for call, fields, urls, (count, money) in TASKS:
        submitted = (await client.submit(call, fields)).json()
        tasks[submitted.pop("task_id")] = urls
        assert submitted == {"err_code": 0, "remaining_count": count, "remaining_money": money}
    assert (await client.submit()).json() == {"err_code": 1, "err_msg": "账户剩余次数不足"}
    await sandbox.control.wait_until_idle()
    for task_id, urls in tasks.items():
        answer = await client.check(task_id)
        result_urls = {name: answer.pop(name) for name in list(answer) if name.endswith("_url")}
        assert set(result_urls) == urls
        assert all(url.startswith(f"{sandbox.url}/") for url in result_urls.values())
        assert answer == {"err_code": 0, "status": "Completed", "remaining_count": 0, "remaining_money": 2}


async def test_failed_task_stays_charged_and_its_error_is_logged(
    sandbox: RunningSandbox, client: SandboxClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    task_ids = [
        await client.submit_accepted(image=make_png(400, 400)[:100]),
        await client.submit_accepted("submit_vector_task"),
    ]
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(fail="内部错误", times=1),)))
    task_ids.append(await client.submit_accepted())
    await sandbox.control.wait_until_idle()
    for task_id in task_ids:
        assert await client.check(task_id) == {"err_code": 0, "status": "Failed"}
    assert "/bin/false" in caplog.text
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(0, 10)


async def test_unknown_accounts_and_tasks(sandbox: RunningSandbox, client: SandboxClient) -> None:
    refused = {"err_code": 1, "err_msg": "账户不存在"}
    assert (await client.submit(user_key="unknown")).json() == refused
    assert await client.check("1", user_key="unknown") == refused
    assert (await client.http.post("/api/check_task_status")).json() == refused
    task_id = await client.submit_accepted(user_key="other")
    for unknown in (task_id, "1"):  # of another account, and of none
        assert await client.check(unknown) == {"err_code": 1, "err_msg": "任务未找到或状态未知"}
    parts = {"user_key": (None, b"other"), "task_id": (None, task_id.encode())}
    await sandbox.control.wait_until_idle()
    assert (await client.http.post("/api/check_task_status", files=parts)).json()["status"] == "Completed"


async def test_concurrent_submits_spend_the_balance_once(sandbox: RunningSandbox, client: SandboxClient) -> None:
    await sandbox.control.set_account("key", AccountBalance(3, 4))
    answers = [answer.json() for answer in await asyncio.gather(*(client.submit() for _ in range(20)))]
    assert [answer["err_code"] for answer in answers].count(0) == 7
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(0, 0)


async def test_invalid_fields_are_named_and_cost_nothing(sandbox: RunningSandbox, client: SandboxClient) -> None:
    for call, field, value in (
        ("submit_task", "upscale", "8.1"),
        ("submit_task", "upscale", "nan"),
        ("submit_task", "s_noise", "1.2"),
        ("submit_task", "steps", "19"),
        ("submit_task", "strong_inpaint_intensity", "1.1"),
        ("submit_task", "high_fidelity", "perhaps"),
        ("submit_vector_task", "color_count", "4.5"),
        ("submit_seamless_task", "fit", ""),
    ):
        answer = (await client.submit(call, {field: value})).json()
        assert (answer["err_code"], answer["err_msg"][: 9 + len(field)]) == (1, f"任务提交失败:参数{field}"), value
    for name in UPSCALE:
        fields = {"user_key": "key", **UPSCALE}
        del fields[name]
        response = await client.http.post("/api/submit_task", data=fields, files={"input_image": make_png()})
        assert response.json() == {"err_code": 1, "err_msg": f"任务提交失败:缺少参数{name}"}
    assert await sandbox.control.list_accounts() == ACCOUNTS


async def test_invalid_images(sandbox: RunningSandbox, client: SandboxClient, monkeypatch: pytest.MonkeyPatch) -> None:
    too_many_pixels = (png_claiming_size(6000, 5000), png_claiming_size(30000, 30000))
    for image in (b"", b"GIF89a\xff\xff\xff\xff\x00", b"<svg/>", *too_many_pixels):
        answer = (await client.submit(image=image)).json()
        assert (answer["err_code"], "图片" in answer["err_msg"]) == (1, True)
    missing = {"err_code": 1, "err_msg": "任务提交失败:缺少参数input_image"}
    for form in ({"data": {"user_key": "key"}}, {"files": {"user_key": (None, b"key")}}):
        assert (await client.http.post("/api/submit_seamless_task", **form)).json() == missing
    monkeypatch.setattr(forms, "MAX_FILE_BYTES", 1_000)
    answer = (await client.submit(image=bytes(1_001))).json()
    assert answer == {"err_code": 1, "err_msg": "任务提交失败:请求格式错误或文件过大"}
    assert await sandbox.control.list_accounts() == ACCOUNTS


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("multipart/form-data; boundary=b", b"--b\r\nnonsense", "账户不存在"),
        ("multipart/form-data; boundary=b", USER_KEY_PART + b"nonsense", "任务提交失败:请求格式错误或文件过大"),
        (
            "multipart/form-data; boundary=b",
            USER_KEY_PART + b'Content-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 300_000 + b"\r\n--b--\r\n",
            "任务提交失败:请求内容过大",
        ),
        ("application/json", b'{"user_key": "key"}', "账户不存在"),
        ("application/x-www-form-urlencoded", b"user_key=key&x=" + b"x" * 300_000, "账户不存在"),
    ],
)
async def test_malformed_bodies(client: SandboxClient, content_type: str, body: bytes, message: str) -> None:
    response = await client.http.post("/api/submit_seamless_task", content=body, headers={"content-type": content_type})
    assert (response.status_code, response.json()) == (200, {"err_code": 1, "err_msg": message})


async def test_only_results_are_served(sandbox: RunningSandbox, client: SandboxClient) -> None:
    task_id = await client.submit_accepted("submit_vector_task")
    await sandbox.control.wait_until_idle()
    answer = await client.check(task_id)
    assert (await client.http.get(answer["vector_url"])).headers["content-type"] == "image/svg+xml"
    url = answer["images_url"]
    response, head = await client.http.get(url), await client.http.head(url)
    assert response.headers["content-type"] == head.headers["content-type"] == "image/png"
    assert (int(head.headers["content-length"]), head.content) == (len(response.content), b"")
    for name in ("grid.png", "input", "../../sandbox.sqlite3", "%2e%2e/input", ""):
        assert (await client.http.get(f"{url.rpartition('/')[0]}/{name}")).status_code == 404
    # Result URLs have the host that the client used.
    data, headers = {"user_key": "key", "task_id": task_id}, {"host": "upstream.example:81"}
    answer = (await client.http.post("/api/check_task_status", data=data, headers=headers)).json()
    assert answer["images_url"] == f"http://upstream.example:81/files/{task_id}/image.png"
