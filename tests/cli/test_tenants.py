from __future__ import annotations

import pytest

from tests.cli.conftest import Shell


async def test_all_properties(shell: Shell) -> None:
    """Every property of a tenant can be set, and is shown."""
    await shell.run("account", "set", "spare", "--user-key-file", "-", stdin="spare-key")
    await shell.run(
        *("tenant", "set", "shop", "--account", "spare", "--account", "main"),
        *("--limit", "day:tasks=100,money=50.5", "--limit", "total:tasks=0", "--max-active", "20"),
        *("--spending-mode", "count_only", "--kind", "upscale", "--kind", "face-enhance", "--disabled"),
    )
    stored = await shell.get_admin("/tenants/shop")
    assert stored["accounts"] == ["spare", "main"]
    assert stored["limits"] == [
        {"window": "day", "tasks": 100, "money": 50.5},
        {"window": "total", "tasks": 0, "money": None},
    ]
    assert (stored["max_active"], stored["spending_mode"], stored["disabled"]) == (20, "count_only", True)
    assert stored["kinds"] == ["upscale", "face-enhance"]
    assert await shell.run_json("tenant", "show", "shop") == stored
    (_, line) = await shell.run_table("tenant", "list")
    limits, kinds = "day 100 tasks + 50.5 yuan, total 0 tasks", "upscale, face-enhance"
    assert line == ["shop", "spare, main", limits, "20", "count_only", kinds, "1", "yes"]


async def test_put_replaces(shell: Shell) -> None:
    """Omitted properties get their defaults; tokens stay."""
    await shell.run(
        "tenant", "set", "shop", "--account", "main", "--max-active", "0", "--kind", "upscale", "--disabled"
    )
    stored = await shell.run_json("tenant", "set", "shop", "--account", "main")
    assert (stored["max_active"], stored["kinds"], stored["disabled"]) == (None, None, False)
    assert len(stored["tokens"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--account is required"),
        (("--account", "main", "--limit", "week:tasks=1"), "must begin with a window"),
        (("--account", "main", "--limit", "day"), "must be a limit such as day:tasks=100"),
        (("--account", "main", "--limit", "day:taks=1"), "must be a limit such as day:tasks=100"),
        (("--account", "main", "--limit", "day:tasks=1,tasks=2"), "must be a limit such as day:tasks=100"),
        (("--account", "main", "--limit", "day:tasks=-1"), "must limit tasks to a whole number"),
        (("--account", "main", "--limit", "day:money=lots"), "must be an amount in yuan"),
        (("--account", "main", "--kind", "enlarge"), "must be upscale or"),
        (("--account", "main", "--spending-mode", "all"), "must be count_only or count_then_money"),
    ],
)
async def test_usage_errors(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    """Usage errors are reported without a request."""
    before = shell.gateway.services.registry.current.version
    assert message in (await shell.run("tenant", "set", "shop", *arguments, code=2)).stderr
    assert shell.gateway.services.registry.current.version == before


async def test_quota(shell: Shell) -> None:
    """Each policy is shown with what remains, money in yuan."""
    assert (await shell.run("quota", "shop")).stdout == "It has no limits.\n"
    limits = ("--limit", "total:tasks=5,money=0.5", "--max-active", "3")
    await shell.run("tenant", "set", "shop", "--account", "main", *limits)
    await shell.gateway.submit()
    assert (await shell.run_table("quota", "shop"))[1:] == [
        ["total-tasks", "tasks", "5", "1", "0", "4", "-", "-"],
        ["total-money", "yuan", "0.5", "0", "0.5", "0", "0", "-"],
        ["max-active", "active", "3", "1", "0", "2", "-", "-"],
    ]
    stored = await shell.get_admin("/tenants/shop")
    assert await shell.run_json("quota", "shop") == {"policies": stored["policies"]}


async def test_show(shell: Shell) -> None:
    await shell.run("tenant", "set", "shop", "--account", "main", "--max-active", "3")
    shown = (await shell.run("tenant", "show", "shop")).stdout
    (token,) = (await shell.get_admin("/tenants/shop"))["tokens"]
    assert all(item in shown for item in ("max-active", token["id"], "kinds:          all\n"))


async def test_delete(shell: Shell) -> None:
    """A tenant with running tasks is deleted with --force only, together with its tokens."""
    await shell.gateway.submit()
    refused = await shell.run("tenant", "delete", "shop", code=1)
    assert refused.stderr == "Conflict: 1 tasks of tenant shop are active. Wait for them, or force it.\n"
    assert (await shell.run("tenant", "delete", "shop", "--force")).stdout == "The tenant shop is deleted.\n"
    assert await shell.run_json("tenant", "list") == {"items": []}
    assert (await shell.gateway.call("GET", "/v1/quota")).status_code == 401
