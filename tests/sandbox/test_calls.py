"""The vendor's calls and files, as documented by the vendor."""

from __future__ import annotations

import asyncio
import sys

import pytest

from service.sandbox import forms
from service.sandbox.app import RunningSandbox
from service.sandbox.faults import Behaviour, Fault, Kind
from service.sandbox.store import AccountBalance
from tests.sandbox import images
from tests.sandbox.conftest import ACCOUNTS, UPSCALE, SandboxClient

SUBMITS: dict[str, Kind] = {
    "submit_task": "upscale",
    "submit_vector_task": "vector",
    "submit_face_enhance_task": "face",
    "submit_seamless_task": "seamless",
}


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
async def test_task(
    sandbox: RunningSandbox, client: SandboxClient, call: str, fields: dict[str, str], urls: set[str]
) -> None:
    """A submit returns id and balance; a finished task the absolute URLs of its kind's results, and the balance."""
    response = await client.submit(call, fields)
    submitted = response.json()
    task_id = submitted.pop("task_id")
    assert (response.status_code, isinstance(task_id, str)) == (200, True)
    assert submitted == {"err_code": 0, "remaining_count": 2, "remaining_money": 10}
    await sandbox.control.wait_until_idle()
    answer = await client.check(task_id)
    result_urls = {name: answer.pop(name) for name in list(answer) if name.endswith("_url")}
    assert set(result_urls) == urls
    assert all(url.startswith(f"{sandbox.url}/") for url in result_urls.values())
    assert answer == {"err_code": 0, "status": "Completed", "remaining_count": 2, "remaining_money": 10}


async def test_durations(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A task takes the duration set when it was submitted; later, shorter ones overtake it."""
    await sandbox.control.set_account("key", AccountBalance(9, 0))
    await sandbox.control.set_behaviour(Behaviour(seconds=3600))
    waiting = [await client.submit_accepted() for _ in range(4)]
    await sandbox.control.set_behaviour(Behaviour(seconds=0))
    quick = await client.submit_accepted()
    async with asyncio.timeout(120):
        while (await client.check(quick))["status"] != "Completed":
            pass
    for task_id in waiting:
        assert await client.check(task_id) == {"err_code": 0, "status": "Processing"}


async def test_failed_tasks(
    sandbox: RunningSandbox, client: SandboxClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed task has a state only, and stays charged; an error of its operation is logged."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    task_ids = [
        await client.submit_accepted(image=images.plain_png(400, 400)[:100]),
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


async def test_invalid_fields(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A field out of range or missing is named in the rejection, and costs nothing."""
    for call, field, value in (
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
    ):
        answer = (await client.submit(call, {field: value})).json()
        assert (answer["err_code"], answer["err_msg"][: 9 + len(field)]) == (1, f"任务提交失败:参数{field}"), value
    for name in UPSCALE:
        fields = {"user_key": "key", **UPSCALE}
        del fields[name]
        response = await client.http.post("/api/submit_task", data=fields, files={"input_image": images.plain_png()})
        assert response.json() == {"err_code": 1, "err_msg": f"任务提交失败:缺少参数{name}"}
    assert await sandbox.control.list_accounts() == ACCOUNTS


async def test_invalid_images(sandbox: RunningSandbox, client: SandboxClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, empty, unknown and oversized files are rejected and cost nothing."""
    too_many_pixels = (images.png_claiming_size(6000, 5000), images.png_claiming_size(30000, 30000))
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
        ("multipart/form-data", b"", "账户不存在"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="user_key"\r\n\r\nkey\r\n--b\r\nnonsense',
            "任务提交失败:请求格式错误或文件过大",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="user_key"\r\n\r\nkey\r\n'
            b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"x" * 300_000 + b"\r\n--b--\r\n",
            "任务提交失败:请求内容过大",
        ),
        ("application/json", b'{"user_key": "key"}', "账户不存在"),
        ("application/x-www-form-urlencoded", b"user_key=\xff", "账户不存在"),
        ("application/x-www-form-urlencoded", b"user_key=key&x=" + b"x" * 300_000, "账户不存在"),
    ],
)
async def test_malformed_bodies(client: SandboxClient, content_type: str, body: bytes, message: str) -> None:
    """A malformed or oversized form gets status 200 and an error message, as the vendor responds."""
    response = await client.http.post("/api/submit_seamless_task", content=body, headers={"content-type": content_type})
    assert (response.status_code, response.json()) == (200, {"err_code": 1, "err_msg": message})


async def test_other_routes(client: SandboxClient) -> None:
    assert (await client.http.get("/")).status_code == 404
    assert (await client.http.post("/api/cancel_task")).status_code == 404
    assert (await client.http.get("/api/submit_task")).status_code == 405


@pytest.fixture
async def urls(sandbox: RunningSandbox, client: SandboxClient) -> dict[str, str]:
    """Return the URLs of a PNG and of an SVG by their content type."""
    task_id = await client.submit_accepted("submit_vector_task")
    await sandbox.control.wait_until_idle()
    answer = await client.check(task_id)
    return {"image/png": answer["images_url"], "image/svg+xml": answer["vector_url"]}


async def test_files(client: SandboxClient, urls: dict[str, str]) -> None:
    """A file has type and length, HEAD returns the same without a body, and nothing but results is served."""
    for content_type, url in urls.items():
        response, head = await client.http.get(url), await client.http.head(url)
        assert response.status_code == head.status_code == 200
        assert response.headers["content-type"] == head.headers["content-type"] == content_type
        assert int(head.headers["content-length"]) == len(response.content) > 0
        assert head.content == b""
    folder, _, task_id = urls["image/png"].rpartition("/")[0], "", urls["image/png"].split("/")[-2]
    for name in ("grid.png", "input", "../../sandbox.sqlite3", "%2e%2e/input", ""):
        assert (await client.http.get(f"{folder}/{name}")).status_code == 404
    # Result URLs have the host that the client used.
    data, headers = {"user_key": "key", "task_id": task_id}, {"host": "upstream.example:81"}
    response = await client.http.post("/api/check_task_status", data=data, headers=headers)
    assert response.json()["images_url"] == f"http://upstream.example:81/files/{task_id}/image.png"


async def test_ranges(client: SandboxClient, urls: dict[str, str]) -> None:
    """A range gets 206 with its bytes and position, 416 beyond the file, and the whole file if not supported."""
    whole = await client.http.get(urls["image/png"])
    length = len(whole.content)
    for text, first, end in (
        ("0-0", 0, 1),
        ("5-9", 5, 10),
        ("5-", 5, length),
        ("-7", length - 7, length),
        ("0-999999999", 0, length),
        ("-999999999", 0, length),
    ):
        response = await client.http.get(urls["image/png"], headers={"range": f"bytes={text}"})
        assert (response.status_code, response.content) == (206, whole.content[first:end])
        assert response.headers["content-range"] == f"bytes {first}-{end - 1}/{length}"
    for text in ("999999999-", "9-5", "-0", "-"):
        response = await client.http.get(urls["image/png"], headers={"range": f"bytes={text}"})
        assert (response.status_code, response.headers["content-range"]) == (416, f"bytes */{length}")
    for status, headers in (
        (200, {"range": "lines=1-2"}),
        (200, {"range": "bytes=0-1,4-5"}),
        (200, {"range": "bytes=0-1", "if-range": '"old"'}),
        (206, {"range": "bytes=0-1", "if-range": whole.headers["etag"]}),
    ):
        assert (await client.http.get(urls["image/png"], headers=headers)).status_code == status
