from __future__ import annotations

from typing import Any

import pytest

from service.usecases.ports import SubmitOutcome
from tests.cli.conftest import Shell


async def create_usage(shell: Shell) -> tuple[dict[str, Any], str]:
    """Create a finished task and a submission of unknown outcome."""
    gateway = shell.gateway
    task = await gateway.wait_for_task((await gateway.submit()).json()["id"])
    await gateway.upstream.lose_next_response()
    return task, (await gateway.submit("vectorize")).json()["submission_id"]


async def test_usage(shell: Shell) -> None:
    """Usage is shown by day, tenant and kind, with a sum and unknown outcomes."""
    _, unknown = await create_usage(shell)
    first, _, head, vector, face, total, _, marked_head, marked = await shell.run_table("usage")
    assert first == ["From 2026-09-01 to 2026-09-21, in UTC."]
    assert head[:6] == ["PERIOD", "TENANT", "KIND", "RUNNING", "SUCCEEDED", "FAILED"]
    assert head[-5:] == ["REFUNDED", "CHARGED", "CHARGED YUAN", "USES", "YUAN"]
    assert vector == ["2026-09-21", "shop", "vectorize", *"00010001000"]
    assert face == ["2026-09-21", "shop", "face-enhance", *"01000001010"]
    assert total == ["total", "-", "-", *"01010002010"]
    assert (marked_head[0], marked) == ("UNKNOWN SUBMISSION", [unknown, "shop", "vectorize", "2026-09-21"])


async def test_usage_options(shell: Shell) -> None:
    """The options are passed on, and JSON is the gateway's response."""
    await create_usage(shell)
    shown = await shell.run_json(
        *("usage", "--from", "2026-09-20", "--to", "2026-09-21", "--interval", "month"),
        *("--group-by", "tenant", "--tenant", "shop"),
    )
    query = "from=2026-09-20&to=2026-09-21&interval=month&group_by=tenant&tenant=shop"
    assert shown == await shell.get_admin(f"/usage?{query}")
    assert [(item["period"], item["tenant"], item["kind"]) for item in shown["items"]] == [("2026-09", "shop", None)]


async def test_usage_as_csv(shell: Shell) -> None:
    """CSV is the gateway's response."""
    await create_usage(shell)
    printed = (await shell.run("usage", "--csv", "--interval", "total", "--group-by", "none")).stdout_bytes
    head, row, end = printed.split(b"\r\n")
    assert head.startswith(b"period,tenant,tenant_id,kind,tasks_running,")
    assert (row, end) == (b"2026-09-01/2026-09-21,,,,0,1,0,1,0,0,2,0,0,0,1,0,0,0,0,0,0", b"")


async def test_reused_name(shell: Shell) -> None:
    """Deleted tenants of the same name are distinguished by their ids."""
    await shell.run("tenant", "create", "other", "--account", "main")
    other = await shell.gateway.new_token("other")
    await shell.gateway.submit(token=other)
    ids = []
    for _ in range(2):
        await shell.gateway.submit()
        ids.append(shell.gateway.services.registry.current.tenants["shop"].id)
        await shell.run("tenant", "delete", "shop", "--force")
        await shell.run("tenant", "create", "shop", "--account", "main")
        shell.gateway.token = await shell.gateway.new_token()
    tenants = [line[1] for line in (await shell.run_table("usage"))[3:6]]
    assert tenants == ["other", f"shop ({ids[0]})", f"shop ({ids[1]})"]


async def test_no_usage(shell: Shell) -> None:
    """Without usage the head and the sum are printed."""
    assert len(await shell.run_table("usage")) == 4


async def test_refund_of_a_task(shell: Shell) -> None:
    """A task is refunded once, and its submission and usage show the reason."""
    task, _ = await create_usage(shell)
    shown = dict(await shell.run_table("refund", task["id"], "--reason", "It came out\nblank."))
    assert (shown["task:"], shown["state of the task:"]) == (task["id"], "succeeded")
    assert (shown["tenant:"], shown["account:"], shown["kind:"]) == ("shop", "main", "face-enhance")
    assert (shown["cost:"], shown["refunded:"]) == ("1 use, 0 yuan, estimated", "1 use, 0 yuan")
    assert shown["reason:"] == "It came out blank."
    assert dict(await shell.run_table("submission", shown["submission:"])) == shown
    refund = (await shell.run_table("usage"))[-1]
    assert refund[:6] == [shown["submission:"], "shop", "face-enhance", "2026-09-21", "1", "0"]
    assert refund[6:] == [shown["refunded at:"], "It came out blank."]
    again = await shell.run("refund", task["id"], "--reason", "once more", code=1)
    assert again.stderr.startswith(f"Conflict: Submission {shown['submission:']} was refunded before, at 2026-")
    assert again.stderr.endswith("with this reason: It came out blank.\n")


async def test_refund_of_a_submission(shell: Shell) -> None:
    """A submission of unknown outcome is refunded by its id."""
    _, unknown = await create_usage(shell)
    shown = await shell.run_json("refund", unknown, "--reason", "outcome unknown")
    assert shown["refund"]["reason"] == "outcome unknown"
    assert shown == await shell.get_admin(f"/submissions/{unknown}") == await shell.run_json("submission", unknown)
    assert dict(await shell.run_table("submission", unknown))["balance suggests:"] == "cannot-tell"


@pytest.mark.parametrize("option", ["--task", "--submission"])
async def test_old_options_of_refunds(shell: Shell, option: str) -> None:
    task, _ = await create_usage(shell)
    assert (await shell.run_json("refund", option, task["id"], "--reason", "blank"))["task"]["id"] == task["id"]


async def test_task(shell: Shell) -> None:
    """A task is shown by its own id or by that of its submission."""
    task, _ = await create_usage(shell)
    shown = dict(await shell.run_table("task", "show", task["id"]))
    assert (shown["tenant:"], shown["account:"], shown["kind:"]) == ("shop", "main", "face-enhance")
    assert (shown["state:"], shown["cost:"]) == ("succeeded", "1 use, 0 yuan, estimated")
    assert dict(await shell.run_table("task", "show", shown["submission:"])) == shown
    assert dict(await shell.run_table("submission", task["id"]))["submission:"] == shown["submission:"]
    assert await shell.run_json("task", "show", task["id"]) == await shell.get_admin(f"/tasks/{task['id']}")


async def test_tasks(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest tasks of a tenant are listed, over several pages if necessary."""
    monkeypatch.setattr("service.cli.usage._MAX_PAGE_SIZE", 1)
    for kind in ("upscale", "vectorize", "upscale"):
        await shell.gateway.submit(kind)
    head, *lines = await shell.run_table("task", "list", "--tenant", "shop", "--kind", "upscale", "--state", "queued")
    assert (head[2:4], head[-1]) == (["KIND", "STATE"], "SUBMISSION")
    items = (await shell.get_admin("/tasks?tenant=shop&kind=upscale"))["items"]
    assert [line[-1] for line in lines] == [item["submission"] for item in items]
    assert [line[2:4] for line in lines] == [["upscale", "queued"]] * 2
    arguments = ("task", "list", "--tenant", "shop", "--limit", "2")
    assert await shell.run_json(*arguments) == await shell.get_admin("/tasks?tenant=shop&limit=2")
    assert '"money": 0,' in (await shell.run(*arguments, "--json")).stdout  # no 0.0


async def test_free_submission(shell: Shell) -> None:
    """A rejected submission cost nothing and cannot be refunded."""
    await shell.gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    await shell.gateway.submit()
    ledger: Any = shell.gateway.services.submissions.ledger
    (refused,) = ledger.reservations
    shown = dict(await shell.run_table("submission", refused))
    assert (shown["outcome:"], shown["task:"], shown["cost:"], shown["refunded:"]) == ("refused", "-", "-", "-")
    answer = await shell.run("refund", refused, "--reason", "x", code=1)
    assert answer.stderr == f"Conflict: Submission {refused} cost nothing: it is refused.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("usage", "--csv", "--json"), "Use --csv or --json, not both."),
        (("usage", "--interval", "week"), "must be day or month or total"),
        (("refund", "--reason", "x"), "The ID of one task or submission is required."),
        (("refund", "a", "--submission", "b", "--reason", "x"), "The ID of one task or submission is required."),
        (("refund", "a"), "--reason is required"),
        (("task", "list"), "--tenant is required"),
        (("submission",), "ID is required"),
    ],
)
async def test_usage_errors(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    """Usage errors are reported without a request."""
    assert message in (await shell.run(*arguments, code=2)).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("usage", "--from", "yesterday"), "Invalid options:\n  from: must be a day such as 2026-01-31\n"),
        (("usage", "--tenant", "unknown", "--csv"), "Invalid options:\n  tenant: there is and was no tenant"),
        (("submission", "f" * 32), "Not found: There is no such submission.\n"),
        (("refund", "--task", "task_x", "--reason", "x"), "Not found: There is no such task.\n"),
        (("task", "show", "task_x"), "Not found: There is no such task.\n"),
        (("task", "list", "--tenant", "unknown"), "Not found: There is and was no tenant of this name.\n"),
        (("refund", "--submission", "../x", "--reason", "x"), "Not found: There is no such submission.\n"),
        (("refund", "--submission", "x", "--reason", " "), "Invalid options:\n  reason: must not be blank\n"),
    ],
)
async def test_refused(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    """The gateway's error detail is printed."""
    assert message in (await shell.run(*arguments, code=1)).stderr
