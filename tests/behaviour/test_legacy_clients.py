"""Programs written for the vendor's API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import pytest

from service.sandbox.app import SandboxConfig, open_sandbox
from service.sandbox.store import AccountBalance
from service.usecases.ports import SubmitOutcome
from tests.behaviour.clients import SUBMIT_FIELDS, LegacyClient
from tests.behaviour.gateway_fixture import RunningGateway, SandboxUpstreamControl
from tests.support.images import make_png

NO_ACCOUNT = "账户不存在"
NOTHING_LEFT = "账户剩余次数不足"
REJECTED = "任务提交失败:"
NOT_FOUND = "任务未找到或状态未知"


@pytest.fixture
def client(gateway: RunningGateway) -> LegacyClient:
    return LegacyClient(gateway.http, gateway.url, gateway.token)


SPELLINGS: Mapping[tuple[str, str], Sequence[tuple[Any, Any]]] = {
    ("high_fidelity", "high_fidelity"): [("True", True), ("false", False), ("1", True), ("OFF", False)],
    ("vector_switch", "vector"): [("False", False), ("true", True), ("0", False), ("on", True), ("No", False)],
    ("steps", "steps"): [("30.0", 30), ("+30", 30), ("2.5e1", 25), ("25.5", 26), ("39.9", 40)],
    ("upscale", "scale"): [("2", 2), (" 2.50", 2.5), (1, 1), ("02", 2), ("2e0", 2)],
    ("strong_inpaint_intensity", "inpaint_strength"): [(".5", 0.5), ("1.", 1), ("-0", 0)],
    ("color_count", "colors"): [("16", 16), ("5.0", 5), ("+5", 5), (" 7", 7), ("1e1", 10)],
    ("sdxl_model_dropdown", "model"): [("通用模型", "general"), ("general", "general"), ("", "general")],
    ("prompt", "prompt"): [("一只猫", "一只猫"), ("", ""), ("x" * 2_000, "x" * 2_000)],
}
"""Values of a field, and of the option that it is."""


async def read_options(gateway: RunningGateway, accepted: dict[str, Any]) -> dict[str, Any]:
    assert accepted["err_code"] == 0, accepted
    options: dict[str, Any] = (await gateway.call("GET", f"/v1/tasks/{accepted['task_id']}")).json()["options"]
    return options


async def test_spellings_of_values(gateway: RunningGateway, client: LegacyClient) -> None:
    for number in range(max(map(len, SPELLINGS.values()))):
        values = {names: spellings[number % len(spellings)] for names, spellings in SPELLINGS.items()}
        sent = {field: value for (field, _), (value, _) in values.items()}
        options = await read_options(gateway, await client.submit("submit_task", SUBMIT_FIELDS["submit_task"] | sent))
        assert {option: options[option] for _, option in values} == {
            option: expected for (_, option), (_, expected) in values.items()
        }


async def test_forms_of_requests(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.upstream.set_balance(100, 0)
    for fields in ({}, {"fit": "0.5", "color_count": "99", "wait": "x"}, {"fit": ["7", "0.5"]}):
        options = await read_options(gateway, await client.submit("submit_seamless_task", fields))
        assert options == {"fit": 0.5}, fields
    for file in (("图.png", make_png(), "image/png"), ("blob", make_png(), "application/octet-stream")):
        parts = [("input_image", file), ("fit", (None, "0.3")), ("user_key", (None, gateway.token))]
        assert await read_options(gateway, await client.post("submit_seamless_task", files=parts)) == {"fit": 0.3}
    task_id = (await client.submit("submit_face_enhance_task"))["task_id"]
    fields = {"user_key": gateway.token, "task_id": task_id}
    headers = {"Content-Type": "application/x-www-form-urlencoded; charset=UTF-8"}
    for request in (
        {"files": {name: (None, value) for name, value in fields.items()}},
        {"content": urlencode(fields).encode(), "headers": headers},
    ):
        assert await client.post("check_task_status", **request) == {"err_code": 0, "status": "Queued"}


async def test_unknown_keys_and_tasks(gateway: RunningGateway, client: LegacyClient) -> None:
    for key in ("", gateway.token[:-1], "upstream-key-main"):
        unknown_client = LegacyClient(gateway.http, gateway.url, key)
        for call in SUBMIT_FIELDS:
            assert await unknown_client.submit(call) == {"err_code": 1, "err_msg": NO_ACCOUNT}
    keyless = await client.post("submit_face_enhance_task", files={"input_image": ("a.png", make_png())})
    assert keyless == {"err_code": 1, "err_msg": NO_ACCOUNT}
    await gateway.put_tenant("other")
    other = LegacyClient(gateway.http, gateway.url, await gateway.new_token("other"))
    two_keys = {"user_key": [other.key, client.key]}
    assert (await client.submit("submit_face_enhance_task", two_keys))["err_code"] == 1
    assert await gateway.upstream.count_submits() == 0
    task_id = (await client.submit("submit_face_enhance_task"))["task_id"]
    for asking, requested_id in ((other, task_id), (client, task_id[:-1])):
        assert await asking.check(requested_id) == {"err_code": 1, "err_msg": NOT_FOUND}


async def test_too_many_active_tasks_and_unknown_outcomes(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.put_tenant(max_active=1)
    first = await client.submit("submit_face_enhance_task")
    refused = await client.submit("submit_face_enhance_task")
    assert refused["err_msg"].startswith(REJECTED)
    assert "max-active" in refused["err_msg"]
    await client.wait_for_end(first["task_id"], gateway.poll_due_tasks)
    await gateway.upstream.lose_next_response()
    refused = await client.submit("submit_face_enhance_task")
    assert refused["err_msg"].startswith(REJECTED)
    assert "submission_id" in refused["err_msg"]  # it may have been charged


async def test_rejections_use_the_vendors_words(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    assert await client.submit("submit_face_enhance_task") == {"err_code": 1, "err_msg": f"{REJECTED}图片太小"}
    assert await gateway.upstream.count_submits() == 1

    faults = {"upscale": "9", "s_noise": "2", "steps": "40.4", "vector_switch": "maybe", "color_count": "1"}
    numbers = [{"steps": value} for value in ("19.6", "nan", "٣٠", "1e999", "-")]
    for fields in (faults, *numbers):
        refused = await client.submit("submit_task", SUBMIT_FIELDS["submit_task"] | fields)
        assert refused["err_msg"].startswith(REJECTED)
        named = [part.partition(":")[0] for part in refused["err_msg"].removeprefix(REJECTED).split("; ")]
        assert named == list(fields)
    for request in (
        {"files": {"input_image": ("a.png", make_png()[:-9])}},
        {"files": {"image": ("a.png", make_png())}},
        {"files": {"input_image": (None, "text")}},
        {"headers": {"Content-Encoding": "gzip"}},
        {"files": None},
    ):
        refused = await client.submit("submit_face_enhance_task", **request)
        assert refused["err_code"] == 1
        assert refused["err_msg"].startswith(REJECTED)
    assert await gateway.upstream.count_submits() == 1


async def test_remaining_balance_is_the_least_of_all_policies(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.upstream.set_balance(50, 70)
    for limits, expected in (
        ([], (49, 70)),
        ([{"window": "day", "tasks": 5, "money": 9.99}, {"window": "total", "tasks": 20}], (3, 9)),
        ([{"window": "total", "tasks": 3}], (0, 70)),
    ):
        await gateway.put_tenant(limits=limits)
        accepted = await client.submit("submit_face_enhance_task")
        assert (accepted["remaining_count"], accepted["remaining_money"]) == expected
        status = await client.wait_for_end(accepted["task_id"], gateway.poll_due_tasks)
        assert (status["remaining_count"], status["remaining_money"]) == expected
    assert await client.submit("submit_face_enhance_task") == {"err_code": 1, "err_msg": NOTHING_LEFT}


async def run_calls(
    client: LegacyClient, sandbox: SandboxUpstreamControl, pause: Callable[[], Awaitable[None]]
) -> list[Any]:
    """Call every operation; return what must be equal at the vendor and the gateway."""
    responses: list[Any] = []
    for call in SUBMIT_FIELDS:
        accepted = await client.submit(call)
        ended = await client.wait_for_end(accepted["task_id"], pause)
        bad = await client.submit(call, dict.fromkeys(("color_count", "fit"), "bad"), files=None)
        bad["err_msg"] = bad["err_msg"].partition(":")[0]
        ended = {name: "" if name.endswith("_url") else value for name, value in ended.items()}
        responses += [accepted | {"task_id": ""}, ended, bad]
    await sandbox.fail_next_task()
    failing = await client.submit("submit_face_enhance_task")
    responses.append(await client.wait_for_end(failing["task_id"], pause))
    unknown = LegacyClient(client.http, client.base, "unknown")
    responses += [await unknown.submit("submit_face_enhance_task"), await unknown.check("x")]
    responses += [await client.check("x"), await client.check(""), await client.check("x" * 1_000)]
    for user_key in await sandbox.control.list_accounts():
        await sandbox.set_balance(0, 0, user_key)
    return [*responses, await client.submit("submit_face_enhance_task")]


async def test_responses_are_the_vendors(gateway: RunningGateway, client: LegacyClient) -> None:
    balance = AccountBalance(count=10, money=300)
    async with open_sandbox(SandboxConfig(accounts={"key": balance}, seconds=0)) as vendor:
        theirs = LegacyClient(gateway.http, vendor.url, "key")
        control = SandboxUpstreamControl(vendor.control)
        expected = await run_calls(theirs, control, vendor.control.wait_until_idle)
    assert await run_calls(client, gateway.upstream, gateway.poll_due_tasks) == expected
    assert expected[-1] == {"err_code": 1, "err_msg": NOTHING_LEFT}
    assert await gateway.upstream.count_submits() == 6
