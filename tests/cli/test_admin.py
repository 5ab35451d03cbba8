"""Commands of the operators: accounts, tenants, tokens, the clock, usage, tasks, refunds and webhooks."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.cli.client import AdminClient, AdminResponse
from tests.behaviour.gateway_fixture import USER_KEY
from tests.behaviour.webhook_receiver import make_secret, run_receiver
from tests.cli.conftest import Shell

Updates = Sequence[tuple[str, dict[str, Any]]]


async def expect_updates(shell: Shell, kind: str, name: str, updates: Updates) -> None:
    """Update an entry with the options of each row; its other properties remain. The registry omits defaults."""
    expected = await shell.get_admin("/registry")
    for options, changes in updates:
        entry = expected[f"{kind}s"][name] | changes
        expected[f"{kind}s"][name] = {key: value for key, value in entry.items() if value is not None}
        printed = (await shell.run(kind, "update", name, *options.split())).stdout
        assert await shell.get_admin("/registry") == expected, options
        assert (printed == "Nothing changed.\n") == (not changes)


ACCOUNT_OPTIONS = (
    *("--base-url", "http://a.test", "--floor-count", "3", "--floor-money", "0.50", "--note", "Of the press."),
    *("--max-price", "upscale=1.25", "--max-price", "vectorize=2"),
)
ACCOUNT_UPDATES: Updates = [
    ("--floor-count 3", {}),
    ("--floor-count 0 --floor-money 0", {"floor_count": None, "floor_money": None}),
    ("--base-url http://b.test --user-key-env NEW_KEY", {"base_url": "http://b.test"}),
    ("--no-base-url --user-key-env NEW_KEY", {"base_url": None}),
    ("--max-price upscale=3 --max-price seamless=1", {"max_price": {"upscale": 3, "vectorize": 2, "seamless": 1}}),
    ("--no-max-price vectorize --no-max-price seamless", {"max_price": {"upscale": 3}}),
]


async def test_account_options_set_what_they_name(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("key-in-a-file\n")
    await shell.run("account", "create", "new", "--user-key-file", str(tmp_path / "key"), *ACCOUNT_OPTIONS)
    stored = await shell.get_admin("/accounts/new")
    assert (stored["floor_count"], stored["floor_money"], stored["note"]) == (3, 0.5, "Of the press.")
    shown = await shell.run_record("account", "show", "new")
    assert (shown["minimum uses:"], shown["minimum yuan:"], shown["base URL:"]) == ("3", "0.5", "http://a.test")
    assert shown["maximum price:"] == "upscale 1.25 yuan, vectorize 2 yuan"
    assert await shell.run_json("account", "show", "new") == stored
    shell.environ["NEW_KEY"] = "key-in-a-file"
    await expect_updates(shell, "account", "new", ACCOUNT_UPDATES)
    printed_changes = await shell.run_table("account", "update", "new", "--floor-count", "1", "--floor-money", "2.5")
    assert printed_changes == [["minimum uses:", "0 -> 1"], ["minimum yuan:", "0 -> 2.5"]]
    assert shell.stored_user_key("new") == "key-in-a-file"

    await shell.run("account", "create", "main", "--user-key-file", "-", stdin="another-key", code=1)
    assert shell.stored_user_key("main") == USER_KEY


async def test_sources_of_keys(shell: Shell) -> None:
    shell.environ["OUR_KEY"] = "key-in-a-variable"
    await shell.run("account", "create", "new", "--user-key-env", "OUR_KEY")
    assert shell.stored_user_key("new") == "key-in-a-variable"
    changed = await shell.run_table("account", "update", "new", "--user-key-file", "-", stdin="key-on-stdin\r\n")
    assert changed == [["user key:", "changed"]]
    assert shell.stored_user_key("new") == "key-on-stdin"
    await shell.run("account", "update", "new", "--user-key-file", "-", stdin=b"\xff\xfe\x00", code=2)
    for options in ((), ("--user-key-prompt",)):  # without a key, and without a terminal
        await shell.run("account", "create", "other", *options, code=1)
    assert "other" not in shell.gateway.services.registry.current.accounts


async def test_process_prompts_for_a_key_without_echo(shell: Shell) -> None:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "account", "create", "new"),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, **shell.environ},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        output = b""
        while b"The user_key of new: " not in output:
            output += await asyncio.to_thread(os.read, ours, 1_000)
        os.write(ours, b"key-of-a-person\n")
        printed, _ = await process.communicate()
        with suppress(OSError):  # on Linux: nothing more was written, and the other end is closed
            output += os.read(ours, 1_000)
    finally:
        os.close(ours)
    assert process.returncode == 0
    assert shell.stored_user_key("new") == "key-of-a-person"
    assert b"key-of-a-person" not in output + printed


async def test_accounts_are_listed_reopened_and_deleted_under_tasks_by_force(shell: Shell) -> None:
    assert (await shell.run_table("account", "list"))[1] == ["main", "open", "-", "-", "-", "0", "0", "-"]
    assert "shop" in (await shell.run("account", "delete", "main", code=1)).stderr  # a tenant uses it
    await shell.gateway.upstream.set_balance(count=1_000, money=7)
    await shell.gateway.submit()
    (line,) = (await shell.run_table("account", "list"))[1:]
    assert (line[:4], line[5:]) == (["main", "open", "999", "7"], ["1", "0", "-"])
    assert await shell.run_json("account", "list") == await shell.get_admin("/accounts")
    await shell.gateway.upstream.set_balance(count=1, money=0)
    await shell.gateway.submit()
    assert (await shell.run_record("account", "show", "main"))["state:"] == "exhausted"
    assert (await shell.run_record("account", "reopen", "main"))["state:"] == "open"
    assert (await shell.run("account", "delete", "main", code=1)).stderr.startswith("Conflict: ")
    assert await shell.run_json("account", "delete", "main", "--force") == {"deleted": "main"}
    assert (await shell.run("account", "show", "main", code=1)).stderr.startswith("Not found: ")


LIMITS = [
    {"window": "day", "tasks": 100, "money": 50.5},
    {"window": "total", "tasks": 0, "money": None, "warn_at": [80, 95]},
]
TENANT_OPTIONS = (
    *("--account", "spare", "--account", "main", "--max-active", "20", "--spending-mode", "count_only"),
    *("--limit", "day:tasks=100,money=50.5", "--limit", "total:tasks=0,warn_at=95/80", "--state", "read-only"),
    *("--kind", "upscale", "--kind", "face-enhance", "--note", "Ask Li before raising a limit."),
    *("--webhook-url", "https://hooks.test/in", "--webhook-allow", "127.0.0.0/8", "--webhook-allow", "other.test"),
    *("--allow-image-url", "images.test", "--allow-image-url", "10.0.0.0/8:81"),
)
TENANT_UPDATES: Updates = [
    ("--max-active 20 --state read-only --no-limit month", {}),
    ("--account main", {"accounts": ["main"]}),
    ("--limit day:tasks=7,money=none", {"limits": [{"window": "day", "tasks": 7, "money": None}, LIMITS[1]]}),
    ("--no-limit day", {"limits": LIMITS[1:]}),
    ("--limit total:warn_at=95", {"limits": [LIMITS[1] | {"warn_at": [95]}]}),
    ("--limit total:tasks=1", {"limits": [LIMITS[1] | {"tasks": 1, "warn_at": [95]}]}),
    ("--limit total:warn_at=none,tasks=0", {"limits": [{"window": "total", "tasks": 0, "money": None}]}),
    ("--limit total:warn_at=80/95", {"limits": LIMITS[1:]}),
    ("--limit hour:money=1", {"limits": [LIMITS[1], {"window": "hour", "tasks": None, "money": 1}]}),
    ("--no-max-active", {"max_active": None}),
    ("--spending-mode count_then_money", {"spending_mode": None}),
    ("--kind seamless", {"kinds": ["seamless"]}),
    ("--all-kinds", {"kinds": None}),
    ("--state disabled", {"state": "disabled"}),
    ("--webhook-url https://b.test/", {"webhook": {"url": "https://b.test/", "allow": ["127.0.0.0/8", "other.test"]}}),
    ("--no-webhook", {"webhook": None}),
    ("--allow-image-url images.test", {"allow_image_url": ["images.test"]}),
    ("--no-image-url", {"allow_image_url": None}),
    ("--note=", {"note": None}),
]


PRICES = ("--max-price", "upscale=3", "--max-price", "vectorize=2", "--max-price", "seamless=1")


async def test_limits_that_do_not_work_as_meant_are_warned_of(shell: Shell) -> None:
    """A limit on money without prices may be held by one task; thresholds without a webhook reach no tenant."""
    created = await shell.run("tenant", "create", "other", "--account", "main", "--limit", "day:money=5,warn_at=80")
    assert created.stdout.count("\nwarning: limits ") == 2
    for options, named in (
        (("--limit", "day:money=6"), ["upscale, vectorize, face-enhance, seamless", "warn_at"]),
        (("--kind", "upscale", "--kind", "face-enhance"), ["upscale, face-enhance", "warn_at"]),
        (("--webhook-url", "https://hooks.test/"), ["upscale, face-enhance"]),
    ):
        lines = (await shell.run("tenant", "update", "other", *options)).stderr.splitlines()
        assert [name in line for name, line in zip(named, lines, strict=True)] == [True] * len(named)
    await shell.run("account", "update", "main", *PRICES)
    (warning,) = (await shell.run_json("tenant", "show", "other"))["warnings"]
    assert warning.startswith("limits have money, but account main has no max_price of face-enhance: ")
    for options in (("--spending-mode", "count_only"), ("--spending-mode", "count_then_money", "--kind", "upscale")):
        assert (await shell.run("tenant", "update", "other", *options)).stderr == ""


async def test_tenant_options_set_what_they_name(shell: Shell) -> None:
    await shell.run("account", "create", "spare", "--user-key-file", "-", stdin="spare-key")
    await shell.run("tenant", "create", "other", *TENANT_OPTIONS)
    stored = await shell.get_admin("/tenants/other")
    assert (stored["accounts"], stored["limits"]) == (["spare", "main"], LIMITS)
    assert (stored["max_active"], stored["spending_mode"], stored["state"]) == (20, "count_only", "read-only")
    assert stored["allow_image_url"] == ["images.test", "10.0.0.0/8:81"]
    assert (stored["kinds"], stored["note"]) == (["upscale", "face-enhance"], "Ask Li before raising a limit.")
    assert await shell.run_json("tenant", "show", "other") == stored
    (_, line, _) = await shell.run_table("tenant", "list")
    limits, kinds = "day 100 tasks + 50.5 yuan, total 0 tasks (warn at 80/95%)", "upscale, face-enhance"
    assert line == ["other", "spare, main", limits, "20", "count_only", kinds, "0", "read-only"]
    await expect_updates(shell, "tenant", "other", TENANT_UPDATES)
    changed = await shell.run_table("tenant", "update", "other", "--no-limit", "hour", "--max-active", "5")
    assert changed == [
        ["limits:", "total 0 tasks (warn at 80/95%), hour 1 yuan -> total 0 tasks (warn at 80/95%)"],
        ["max active:", "- -> 5"],
    ]

    before = await shell.get_admin("/registry")
    await shell.run("tenant", "create", "other", "--account", "main", "--max-active", "0", code=1)
    assert await shell.get_admin("/registry") == before


async def test_update_keeps_a_concurrent_change(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    await shell.run("tenant", "update", "shop", "--limit", "total:tasks=0")
    send, others = AdminClient.request, ["hour", "minute"]

    def change_before_patch(client: AdminClient, method: str, *path: str, **options: Any) -> AdminResponse:
        if method == "PATCH" and others:
            current = send(client, "GET", *path).decode(dict[str, Any])["limits"]
            send(client, "PATCH", *path, body={"limits": [*current, {"window": others.pop(), "tasks": 9}]})
        return send(client, method, *path, **options)

    monkeypatch.setattr(AdminClient, "request", change_before_patch)
    await shell.run("tenant", "update", "shop", "--limit", "day:tasks=1", "--no-limit", "total")
    limits = {limit["window"]: limit["tasks"] for limit in (await shell.get_admin("/tenants/shop"))["limits"]}
    assert limits == {"day": 1, "minute": 9, "hour": 9}


async def test_tenant_is_shown_disabled_enabled_and_deleted_under_tasks_by_force(shell: Shell) -> None:
    assert len(await shell.run_table("quota", "shop")) == 1
    await shell.run("tenant", "update", "shop", "--limit", "total:tasks=5,money=0.5", "--max-active", "3")
    await shell.gateway.submit()
    assert (await shell.run_table("quota", "shop"))[1:] == [
        ["total-tasks", "tasks", "5", "1", "0", "4", "-", "-"],
        ["total-money", "yuan", "0.5", "0", "0.5", "0", "0", "-"],
        ["max-active", "active", "3", "1", "0", "2", "-", "-"],
    ]
    stored = await shell.get_admin("/tenants/shop")
    assert await shell.run_json("quota", "shop") == {"policies": stored["policies"]}
    assert '"limit": 5,' in (await shell.run("quota", "shop", "--json")).stdout  # no 5.0
    assert stored["tokens"][0]["id"] in (await shell.run("tenant", "show", "shop")).stdout

    assert await shell.run_table("tenant", "disable", "shop") == [["state:", "active -> disabled"]]
    assert not await shell.is_accepted()
    assert await shell.run_table("tenant", "enable", "shop") == [["state:", "disabled -> active"]]
    assert await shell.is_accepted()
    assert (await shell.run("tenant", "delete", "shop", code=1)).stderr.startswith("Conflict: ")
    assert await shell.run_json("tenant", "delete", "shop", "--force") == {"deleted": "shop"}
    assert await shell.run_json("tenant", "list") == {"items": []}
    assert not await shell.is_accepted()


async def test_tokens_are_printed_alone_and_listed_one_per_line(shell: Shell) -> None:
    (first,) = (await shell.get_admin("/tenants/shop"))["tokens"]
    created = await shell.run("token", "create", "shop", "--label", "two\nlines \x1b[31mred")
    token = created.stdout.removesuffix("\n")
    assert await shell.is_accepted(token)
    assert token not in created.stderr
    result = await shell.run_json("token", "create", "shop", "--expires-in", "90d")
    left = datetime.fromisoformat(result["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=89) < left <= timedelta(days=90)
    await shell.run("token", "create", "shop", "--expires-at", "2999-12-31T23:30:00+08:00")
    stored = (await shell.get_admin("/tenants/shop"))["tokens"]
    lines = {line[0]: line[1:] for line in await shell.run_table("token", "list", "shop")}
    assert lines.keys() == {"TOKEN", *(item["id"] for item in stored)}
    (labelled,) = (item["id"] for item in stored if item["label"])
    assert (lines[labelled][0], lines[labelled][-1]) == ("two lines [31mred", "-")
    assert "2999-12-31T15:30:00Z" in [line[-1] for line in lines.values()]
    assert await shell.run_json("token", "list", "shop") == {"items": stored}

    await shell.run("token", "revoke", "shop", result["id"], "--grace", "1h")
    assert await shell.is_accepted(result["token"])
    assert await shell.run_json("token", "revoke", "shop", labelled) == {"revoked": [labelled], "grace_seconds": 0}
    assert not await shell.is_accepted(token)
    printed = (await shell.run("tenant", "revoke-all", "shop")).stdout
    assert all(item["id"] in printed for item in (first, result))
    assert not await shell.is_accepted()
    assert await shell.run_json("tenant", "revoke-all", "shop") == {"revoked": []}


async def test_clock_reset_prints_the_offset(shell: Shell) -> None:
    await shell.gateway.advance(0)  # the clock stands still from here
    await shell.gateway.submit()
    await shell.gateway.advance(-1_200)
    assert await shell.run_json("clock", "reset") == {"offset_seconds": 1_200}
    assert "0 s ahead" in (await shell.run("clock", "reset")).stdout


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
        assert await shell.run_json("tenant", "delete", "shop", "--force") == {"deleted": "shop"}
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
        hook = ("--webhook-url", receiver.url, "--webhook-allow", receiver.network, "--webhook-allow", "hooks.test")
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
        await shell.run(*update, "--webhook-allow", receiver.network)
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
    await shell.gateway.deliver_due_webhooks()


async def test_errors_of_the_gateway_are_printed(shell: Shell) -> None:
    for arguments, error in (
        ("usage --tenant unknown --csv", "Invalid options:\n  tenant: "),
        ("refund task_x --reason x", "Not found: "),
        ("refund x --reason=", "Invalid options:\n  reason: "),
    ):
        assert (await shell.run(*arguments.split(), code=1)).stderr.startswith(error), arguments
