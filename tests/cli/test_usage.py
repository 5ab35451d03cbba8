"""Commands for usage, tasks, submissions, refunds and webhooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.behaviour.webhook_receiver import make_secret, run_receiver
from tests.cli.conftest import Shell


async def create_usage(shell: Shell) -> tuple[dict[str, Any], str]:
    """Create a finished task and a submission of unknown outcome."""
    gateway = shell.gateway
    task = await gateway.wait_for_task((await gateway.submit()).json()["id"])
    await gateway.upstream.lose_next_response()
    return task, (await gateway.submit("vectorize")).json()["submission_id"]


async def test_usage_is_printed_with_unknown_outcomes_or_as_json_or_csv(shell: Shell) -> None:
    assert len(await shell.run_table("usage")) == 4
    _, unknown = await create_usage(shell)
    report = await shell.get_admin("/usage")
    day = report["to"]
    first, _, head, vector, face, total, _, marked_head, marked = await shell.run_table("usage")
    assert first == [f"From {report['from']} to {day}, in UTC."]
    assert (head[:4], head[-2:]) == (["PERIOD", "TENANT", "KIND", "RUNNING"], ["USES", "YUAN"])
    assert vector == [day, "shop", "vectorize", *"00010001000"]
    assert face == [day, "shop", "face-enhance", *"01000001010"]
    assert total == ["total", "-", "-", *"01010002010"]
    assert (marked_head[0], marked) == ("UNKNOWN SUBMISSION", [unknown, "shop", "vectorize", day])
    options = f"usage --from {day} --to {day} --interval month --group-by tenant --tenant shop"
    query = f"from={day}&to={day}&interval=month&group_by=tenant&tenant=shop"
    assert await shell.run_json(*options.split()) == await shell.get_admin(f"/usage?{query}")
    head_line, row, _ = (await shell.run(*options.split(), "--csv")).stdout_bytes.split(b"\r\n")
    assert head_line.startswith(b"period,tenant,tenant_id,kind,tasks_running,")
    assert row.startswith(f"{day[:7]},shop,".encode())


async def test_deleted_tenants_of_the_same_name_have_their_ids(shell: Shell) -> None:
    ids = []
    for _ in range(2):
        await shell.gateway.submit()
        ids.append(shell.gateway.services.registry.current.tenants["shop"].id)
        await shell.run("tenant", "delete", "shop", "--force")
        await shell.run("tenant", "create", "shop", "--account", "main")
        shell.gateway.token = await shell.gateway.new_token()
    assert [line[1] for line in (await shell.run_table("usage"))[3:5]] == [f"shop ({number})" for number in ids]


async def test_refund_of_a_task_or_a_submission_is_made_once(shell: Shell) -> None:
    task, unknown = await create_usage(shell)
    shown = await shell.run_record("refund", "--task", task["id"], "--reason", "It came out\nblank.")
    assert (shown["task:"], shown["tenant:"], shown["account:"]) == (task["id"], "shop", "main")
    assert (shown["cost:"], shown["refunded:"]) == ("1 use, 0 yuan, estimated", "1 use, 0 yuan")
    assert shown["reason:"] == "It came out blank."
    assert await shell.run_record("submission", shown["submission:"]) == shown
    refund = (await shell.run_table("usage"))[-1]
    assert (refund[:3], refund[4:6]) == ([shown["submission:"], "shop", "face-enhance"], ["1", "0"])
    assert refund[6:] == [shown["refunded at:"], "It came out blank."]
    again = await shell.run("refund", task["id"], "--reason", "once more", code=1)
    assert again.stderr.startswith(f"Conflict: Submission {shown['submission:']} was refunded before")
    other = await shell.run_json("refund", "--submission", unknown, "--reason", "outcome unknown")
    assert other == await shell.get_admin(f"/submissions/{unknown}") == await shell.run_json("submission", unknown)
    assert (await shell.run_record("submission", unknown))["balance suggests:"] == "cannot-tell"


async def test_tasks_are_shown_by_either_id_and_listed_over_pages(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = await create_usage(shell)
    shown = await shell.run_record("task", "show", task["id"])
    assert (shown["tenant:"], shown["account:"], shown["kind:"]) == ("shop", "main", "face-enhance")
    assert (shown["state:"], shown["cost:"]) == ("succeeded", "1 use, 0 yuan, estimated")
    assert await shell.run_record("task", "show", shown["submission:"]) == shown
    assert (await shell.run_record("submission", task["id"]))["submission:"] == shown["submission:"]
    assert await shell.run_json("task", "show", task["id"]) == await shell.get_admin(f"/tasks/{task['id']}")

    monkeypatch.setattr("service.cli.usage._MAX_PAGE_SIZE", 1)
    for kind in ("upscale", "vectorize", "upscale"):
        await shell.gateway.submit(kind)
    head, *lines = await shell.run_table("task", "list", "--tenant", "shop", "--kind", "upscale", "--state", "queued")
    assert (head[2:4], head[-1]) == (["KIND", "STATE"], "SUBMISSION")
    items = (await shell.get_admin("/tasks?tenant=shop&kind=upscale"))["items"]
    assert [(*line[2:4], line[-1]) for line in lines] == [("upscale", "queued", item["submission"]) for item in items]
    assert len(items) == 2
    arguments = ("task", "list", "--tenant", "shop", "--limit", "2")
    assert await shell.run_json(*arguments) == await shell.get_admin("/tasks?tenant=shop&limit=2")


async def test_webhook_secrets_are_set_generated_and_rotated(shell: Shell, tmp_path: Path) -> None:
    update = ("tenant", "update", "shop")
    (tmp_path / "secret").write_text(make_secret() + "\n")
    async with run_receiver() as receiver:
        hook = ("--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8", "--webhook-allow", "hooks.test")
        generated = await shell.run(*update, *hook)
        assert generated.stdout.count("whsec_") == 1
        unchanged, shown = await shell.run(*update, *hook), await shell.run("tenant", "show", "shop")
        assert "whsec_" not in unchanged.stdout + shown.stdout
        assert f"{receiver.url}\n" in shown.stdout
        given = await shell.run(*update, "--webhook-secret-file", str(tmp_path / "secret"))
        assert given.stdout.split() == ["webhook", "secret:", "changed"]
        await deliver_webhook(shell)
        assert receiver.requests[0].is_signed_with(make_secret())

        rotated = await shell.run("webhook", "rotate-secret", "shop", "--grace", "7d")
        assert "signs too until" in rotated.stderr
        assert "signs too" not in (await shell.run("webhook", "rotate-secret", "shop")).stderr
        newest = await shell.run_json("webhook", "rotate-secret", "shop")
        await deliver_webhook(shell)
        assert receiver.requests[1].is_signed_with(newest["secret"])
        assert not receiver.requests[1].is_signed_with(rotated.stdout.strip())


async def test_failed_deliveries_are_listed_and_redelivered(shell: Shell) -> None:
    async with run_receiver() as receiver:
        update = ("tenant", "update", "shop", "--webhook-url", receiver.url)
        await shell.run(*update, "--webhook-allow", "127.0.0.0/8")
        receiver.statuses = [410]
        await deliver_webhook(shell)
        _, line = await shell.run_table("webhook", "failed", "--limit", "1")
        assert (line[1:5], line[6]) == (["shop", "off", "1", "410"], receiver.url)
        assert await shell.run_json("webhook", "failed") == await shell.get_admin("/webhooks/failed")
        _, again = await shell.run_table("webhook", "redeliver", line[0])
        assert again[:4] == [line[0], "shop", "pending", "0"]
        assert (await shell.run_json("webhook", "redeliver", line[0]))["state"] == "pending"
        assert await shell.run_json("webhook", "failed") == {"items": []}
        assert await shell.run_table(*update) == [["disabled URLs:", f"{receiver.url} -> -"]]


async def deliver_webhook(shell: Shell) -> None:
    """Finish a task, which sends its webhook."""
    await shell.gateway.wait_for_task((await shell.gateway.submit()).json()["id"])
    while await shell.gateway.services.webhook_dispatcher.start_due():
        await shell.gateway.services.webhook_dispatcher.wait_idle()


async def test_errors_of_the_gateway_are_printed(shell: Shell) -> None:
    for arguments, error in (
        ("usage --tenant unknown --csv", "Invalid options:\n  tenant: "),
        ("refund task_x --reason x", "Not found: "),
        ("refund x --reason=", "Invalid options:\n  reason: "),
    ):
        assert (await shell.run(*arguments.split(), code=1)).stderr.startswith(error), arguments
