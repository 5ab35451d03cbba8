"""Programs written for the vendor's API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import pytest

from service.sandbox.app import RunningSandbox, SandboxConfig, open_sandbox
from service.sandbox.faults import Behaviour
from service.sandbox.store import AccountBalance
from service.usecases.ports import SubmitOutcome
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.legacy_client import SUBMIT_FIELDS, LegacyClient, field_types
from tests.behaviour.upstream_control import SandboxUpstreamControl
from tests.support.images import make_png
from tests.support.valkey import Valkey

NO_ACCOUNT = "账户不存在"
NOTHING_LEFT = "账户剩余次数不足"
REJECTED = "任务提交失败:"
NOT_FOUND = "任务未找到或状态未知"


@pytest.fixture
def client(gateway: RunningGateway) -> LegacyClient:
    return LegacyClient(gateway.http, gateway.url, gateway.token)


async def test_every_kind_completes(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.upstream.set_balance(10, 300)
    for remaining, (call, fields) in zip((9, 8, 7, 6), SUBMIT_FIELDS.items(), strict=True):
        accepted = await client.submit(call)
        assert field_types(accepted) == {
            "err_code": "int",
            "remaining_count": "int",
            "remaining_money": "int",
            "task_id": "str",
        }
        assert (accepted["err_code"], accepted["remaining_count"], accepted["remaining_money"]) == (0, remaining, 300)
        assert (await client.check(accepted["task_id"])) == {"err_code": 0, "status": "Queued"}
        status = await client.wait_for_end(accepted["task_id"], gateway.poll_due_tasks)
        assert (status["err_code"], status["status"]) == (0, "Completed")
        assert (status["remaining_count"], status["remaining_money"]) == (remaining, 300)
        assert status["images_url"].startswith("http://")
        task = (await gateway.call("GET", f"/v1/tasks/{accepted['task_id']}")).json()
        assert task["state"] == "succeeded"
        assert len(task["options"]) == len(fields)
    assert await gateway.upstream.count_submits() == 4


async def test_failed_task(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.upstream.fail_next_task()
    accepted = await client.submit("submit_face_enhance_task")
    status = await client.wait_for_end(accepted["task_id"], gateway.poll_due_tasks)
    assert status == {"err_code": 0, "status": "Failed"}


async def test_spellings_of_values(gateway: RunningGateway, client: LegacyClient) -> None:
    cases: dict[str, list[tuple[Any, Any]]] = {
        "high_fidelity": [
            ("True", True),
            ("False", False),
            ("true", True),
            ("false", False),
            ("1", True),
            ("0", False),
            ("on", True),
            ("OFF", False),
            ("Yes", True),
            ("no", False),
            (" true ", True),
        ],
        "steps": [
            ("30.0", 30),
            ("+30", 30),
            (" 30 ", 30),
            ("25.", 25),
            ("2.5e1", 25),
            ("25.4", 25),
            ("25.5", 26),
            ("39.9", 40),
            (20, 20),
            ("40.0", 40),
        ],
        "upscale": [("2", 2.0), ("2.50", 2.5), (1, 1.0), ("8.0", 8.0), ("+2", 2.0), ("02", 2.0), ("2e0", 2.0)],
        "strong_inpaint_intensity": [(".5", 0.5), ("+.25", 0.25), ("1.", 1.0), ("-0", 0.0)],
        "color_count": [("16", 16), ("5.0", 5), ("+5", 5), (" 7", 7), ("1e1", 10)],
        "sdxl_model_dropdown": [("通用模型", "general"), ("general", "general"), ("", "general")],
        "prompt": [("一只猫", "一只猫"), ("", ""), ("x" * 2_000, "x" * 2_000)],
    }
    names = {"upscale": "scale", "color_count": "colors", "sdxl_model_dropdown": "model"}
    names |= {"strong_inpaint_intensity": "inpaint_strength"}
    await gateway.upstream.set_balance(100, 0)
    for field, spellings in cases.items():
        for sent, expected in spellings:
            accepted = await client.submit("submit_task", dict(SUBMIT_FIELDS["submit_task"]) | {field: sent})
            assert accepted["err_code"] == 0, accepted
            task = (await gateway.call("GET", f"/v1/tasks/{accepted['task_id']}")).json()
            assert task["options"][names.get(field, field)] == expected


async def test_missing_unknown_and_repeated_fields(gateway: RunningGateway, client: LegacyClient) -> None:
    for fields in ({}, {"fit": ""}, {"fit": "0.5", "color_count": "99", "wait": "x"}, {"fit": ["7", "0.5"]}):
        accepted = await client.submit("submit_seamless_task", fields)
        task = (await gateway.call("GET", f"/v1/tasks/{accepted['task_id']}")).json()
        assert task["options"] == {"fit": 0.5}, fields
    bare = await client.submit("submit_task", {})
    assert bare["err_code"] == 0


async def test_parts_in_any_order(gateway: RunningGateway, client: LegacyClient) -> None:
    for name, media_type in (("图.png", "image/png"), ("blob", "application/octet-stream"), ("x.jpeg", "image/jpeg")):
        parts = [
            ("input_image", (name, make_png(), media_type)),
            ("fit", (None, "0.3")),
            ("user_key", (None, gateway.token)),
        ]
        accepted = await client.post("submit_seamless_task", files=parts)
        assert accepted["err_code"] == 0, accepted


async def test_check_in_both_encodings(gateway: RunningGateway, client: LegacyClient) -> None:
    task_id = (await client.submit("submit_face_enhance_task"))["task_id"]
    fields = {"user_key": gateway.token, "task_id": task_id}
    headers = {"Content-Type": "application/x-www-form-urlencoded; charset=UTF-8"}
    for request in (
        {"data": fields},
        {"files": {name: (None, value) for name, value in fields.items()}},
        {"content": urlencode(fields).encode(), "headers": headers},
    ):
        assert await client.post("check_task_status", **request) == {"err_code": 0, "status": "Queued"}


async def test_unknown_user_key(gateway: RunningGateway) -> None:
    for key in ("", "x", gateway.token[:-1], gateway.token.lower(), "upstream-key-main"):
        unknown_client = LegacyClient(gateway.http, gateway.url, key)
        for call in SUBMIT_FIELDS:
            assert await unknown_client.submit(call) == {"err_code": 1, "err_msg": NO_ACCOUNT}
        assert await unknown_client.check("task_x") == {"err_code": 1, "err_msg": NO_ACCOUNT}
    client = LegacyClient(gateway.http, gateway.url, gateway.token)
    keyless = await client.post("submit_face_enhance_task", files={"input_image": ("a.png", make_png())})
    assert keyless == {"err_code": 1, "err_msg": NO_ACCOUNT}
    assert await gateway.upstream.count_submits() == 0


async def test_spent_limit_is_an_exhausted_balance(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1}])
    assert (await client.submit("submit_face_enhance_task"))["remaining_count"] == 0
    assert await client.submit("submit_face_enhance_task") == {"err_code": 1, "err_msg": NOTHING_LEFT}
    await gateway.put_tenant()
    await gateway.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    assert await client.submit("submit_face_enhance_task") == {"err_code": 1, "err_msg": NOTHING_LEFT}


async def test_too_many_active_tasks_is_retryable(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.put_tenant(max_active=1)
    first = await client.submit("submit_face_enhance_task")
    refused = await client.submit("submit_face_enhance_task")
    assert refused["err_msg"].startswith(REJECTED)
    assert "max-active" in refused["err_msg"]
    await client.wait_for_end(first["task_id"], gateway.poll_due_tasks)
    assert (await client.submit("submit_face_enhance_task"))["err_code"] == 0


async def test_rejections_use_the_vendors_words(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    assert await client.submit("submit_face_enhance_task") == {"err_code": 1, "err_msg": f"{REJECTED}图片太小"}
    assert await gateway.upstream.count_submits() == 1

    faults = {"upscale": "9", "s_noise": "2", "steps": "40.4", "vector_switch": "maybe", "color_count": "1"}
    refused = await client.submit("submit_task", dict(SUBMIT_FIELDS["submit_task"]) | faults)
    assert refused["err_msg"].startswith(REJECTED)
    assert [part.partition(":")[0] for part in refused["err_msg"].removeprefix(REJECTED).split("; ")] == list(faults)
    for value in ("19.6", "nan", "thirty", "3_0", "٣٠", "0x1e", "1e999", "-", "."):
        refused = await client.submit("submit_task", dict(SUBMIT_FIELDS["submit_task"]) | {"steps": value})
        assert refused["err_msg"] == f"{REJECTED}steps: must be a whole number from 20 to 40"

    for request in (
        {"files": {"input_image": ("a.gif", b"GIF89a")}},
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


async def test_unknown_outcome_reports_the_submission_id(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.upstream.lose_next_response()
    refused = await client.submit("submit_face_enhance_task")
    assert refused["err_msg"].startswith(REJECTED)
    assert "may have been charged" in refused["err_msg"]
    assert "submission_id" in refused["err_msg"]


async def test_unknown_task(gateway: RunningGateway, client: LegacyClient) -> None:
    task_id = (await client.submit("submit_face_enhance_task"))["task_id"]
    await gateway.put_tenant("other")
    other = LegacyClient(gateway.http, gateway.url, await gateway.new_token("other"))
    for asking, requested_id in ((other, task_id), (client, task_id[:-1]), (client, ""), (client, "x" * 1_000)):
        assert await asking.check(requested_id) == {"err_code": 1, "err_msg": NOT_FOUND}
    nothing = await client.post("check_task_status", data={"user_key": gateway.token})
    assert nothing == {"err_code": 1, "err_msg": NOT_FOUND}


async def test_remaining_balance_is_the_least_of_all_policies(gateway: RunningGateway, client: LegacyClient) -> None:
    await gateway.upstream.set_balance(50, 70)
    accepted = await client.submit("submit_face_enhance_task")
    assert (accepted["remaining_count"], accepted["remaining_money"]) == (49, 70)
    limits = [{"window": "day", "tasks": 5, "money": 9.99}, {"window": "total", "tasks": 20}]
    await gateway.put_tenant(limits=limits)
    accepted = await client.submit("submit_face_enhance_task")
    assert (accepted["remaining_count"], accepted["remaining_money"]) == (3, 9)
    status = await client.wait_for_end(accepted["task_id"], gateway.poll_due_tasks)
    assert (status["remaining_count"], status["remaining_money"]) == (3, 9)


@pytest.fixture
async def vendor() -> AsyncIterator[RunningSandbox]:
    async with open_sandbox(SandboxConfig(accounts={"key": AccountBalance(count=10, money=300)}, seconds=0)) as sandbox:
        yield sandbox


async def test_responses_have_the_vendors_shape(vendor: RunningSandbox, valkey: Valkey) -> None:
    async def run_calls(client: LegacyClient, between: Any) -> list[Any]:
        responses: list[Any] = []
        for call in SUBMIT_FIELDS:
            accepted = await client.submit(call)
            responses += [field_types(accepted), accepted["remaining_count"], accepted["remaining_money"]]
            ended = await client.wait_for_end(accepted["task_id"], between)
            responses += [field_types(ended), ended["status"], ended["remaining_count"], ended["remaining_money"]]
            bad = await client.submit(call, dict.fromkeys(("color_count", "fit"), "bad"), files=None)
            responses += [field_types(bad), bad["err_msg"].partition(":")[0]]
        unknown_client = LegacyClient(client.http, client.base, "unknown")
        responses += [await unknown_client.submit("submit_face_enhance_task"), await unknown_client.check("x")]
        responses += [await client.check("x"), await client.check("")]
        return responses

    async def spent(client: LegacyClient, control: Any, key: str) -> dict[str, Any]:
        await control.set_account(key, AccountBalance(count=0, money=0))
        return await client.submit("submit_face_enhance_task")

    async with run_real_gateway(valkey) as gateway:
        assert isinstance(gateway.upstream, SandboxUpstreamControl)
        await gateway.upstream.control.set_behaviour(Behaviour())
        ours = LegacyClient(gateway.http, gateway.url, gateway.token)
        theirs = LegacyClient(gateway.http, vendor.url, "key")
        assert await run_calls(ours, gateway.poll_due_tasks) == await run_calls(theirs, vendor.control.wait_until_idle)
        nothing = {"err_code": 1, "err_msg": NOTHING_LEFT}
        assert await spent(theirs, vendor.control, "key") == nothing
        assert await spent(ours, gateway.upstream.control, "upstream-key-main") == nothing
