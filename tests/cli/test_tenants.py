from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from service.cli.client import AdminClient, AdminResponse
from tests.cli.conftest import Shell

ALL_OPTIONS = (
    *("--account", "spare", "--account", "main", "--max-active", "20", "--spending-mode", "count_only"),
    *("--limit", "day:tasks=100,money=50.5", "--limit", "total:tasks=0", "--state", "read-only"),
    *("--kind", "upscale", "--kind", "face-enhance"),
    *("--note", "Ask Li before raising a limit."),
    *("--webhook-url", "https://hooks.test/in", "--webhook-allow", "127.0.0.0/8", "--webhook-allow", "other.test"),
)
LIMITS = [{"window": "day", "tasks": 100, "money": 50.5}, {"window": "total", "tasks": 0, "money": None}]


@pytest.fixture
async def other(shell: Shell) -> Mapping[str, Any]:
    """Create the tenant `other` with all options, and return its entry of the registry."""
    await shell.run("account", "create", "spare", "--user-key-file", "-", stdin="spare-key")
    await shell.run("tenant", "create", "other", *ALL_OPTIONS)
    entry: Mapping[str, Any] = (await shell.get_admin("/registry"))["tenants"]["other"]
    return entry


async def test_create(shell: Shell, other: Mapping[str, Any]) -> None:
    """Every property of a tenant can be set, and is shown."""
    stored = await shell.get_admin("/tenants/other")
    assert (stored["accounts"], stored["limits"]) == (["spare", "main"], LIMITS)
    assert (stored["max_active"], stored["spending_mode"], stored["state"]) == (20, "count_only", "read-only")
    assert stored["kinds"] == other["kinds"] == ["upscale", "face-enhance"]
    assert await shell.run_json("tenant", "show", "other") == stored
    (_, line, _) = await shell.run_table("tenant", "list")
    limits, kinds = "day 100 tasks + 50.5 yuan, total 0 tasks", "upscale, face-enhance"
    assert line == ["other", "spare, main", limits, "20", "count_only", kinds, "0", "read-only"]


async def test_create_existing(shell: Shell) -> None:
    """An existing tenant is not replaced."""
    before = shell.gateway.services.registry.current.version
    refused = await shell.run("tenant", "create", "shop", "--account", "main", "--max-active", "0", code=1)
    assert refused.stderr == "gateway: the tenant shop exists already: use `gateway tenant update`\n"
    assert shell.gateway.services.registry.current.version == before


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (("--account", "main"), {"accounts": ["main"]}),
        (("--limit", "day:tasks=7"), {"limits": [{**LIMITS[0], "tasks": 7}, LIMITS[1]]}),
        (("--limit", "day:tasks=7,money=none"), {"limits": [{"window": "day", "tasks": 7, "money": None}, LIMITS[1]]}),
        (("--limit", "hour:money=1"), {"limits": [*LIMITS, {"window": "hour", "tasks": None, "money": 1}]}),
        (("--no-limit", "day"), {"limits": LIMITS[1:]}),
        (("--no-limit", "day", "--no-limit", "total"), {"limits": None}),
        (("--no-limit", "month"), {}),
        (("--max-active", "0"), {"max_active": 0}),
        (("--no-max-active",), {"max_active": None}),
        (("--spending-mode", "count_then_money"), {"spending_mode": None}),
        (("--kind", "seamless"), {"kinds": ["seamless"]}),
        (("--all-kinds",), {"kinds": None}),
        (("--state", "disabled"), {"state": "disabled"}),
        (("--webhook-url", "https://b.test/"), {"webhook": {"url": "https://b.test/"}}),
        (("--webhook-allow", "b.test"), {"webhook": {"allow": ["b.test"]}}),
        (("--no-webhook",), {"webhook": None}),
        (("--note", "Another."), {"note": "Another."}),
        (("--note", ""), {"note": None}),
        (("--max-active", "20", "--state", "read-only"), {}),
    ],
)
async def test_update(
    shell: Shell, other: Mapping[str, Any], options: tuple[str, ...], changes: Mapping[str, Any]
) -> None:
    """An update changes what its options name, and nothing else in the registry, which omits defaults."""
    expected = await shell.get_admin("/registry")
    if changes.get("webhook"):
        changes = {"webhook": other["webhook"] | changes["webhook"]}
    expected["tenants"]["other"] = {name: value for name, value in {**other, **changes}.items() if value is not None}
    printed = (await shell.run("tenant", "update", "other", *options)).stdout
    assert await shell.get_admin("/registry") == expected
    assert (printed == "Nothing changed.\n") == (not changes)


@pytest.mark.usefixtures("other")
async def test_printed_changes(shell: Shell) -> None:
    """An update prints the old and the new values, or the response."""
    printed = await shell.run("tenant", "update", "other", "--limit", "day:tasks=200,money=50.5", "--no-max-active")
    assert printed.stdout == (
        "limits:      day 100 tasks + 50.5 yuan, total 0 tasks -> day 200 tasks + 50.5 yuan, total 0 tasks\n"
        "max active:  20 -> -\n"
    )
    response = await shell.run_json("tenant", "update", "other", "--max-active", "3")
    assert response == await shell.get_admin("/tenants/other")
    assert response["max_active"] == 3


@pytest.mark.usefixtures("other")
async def test_concurrent_updates(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that was changed meanwhile is read again, so that the other change is kept."""
    send, others = AdminClient.request, ["hour", "minute"]

    def change_before_patch(client: AdminClient, method: str, *path: str, **options: Any) -> AdminResponse:
        if method == "PATCH" and others:
            current = send(client, "GET", *path).decode(dict[str, Any])["limits"]
            send(client, "PATCH", *path, body={"limits": [*current, {"window": others.pop(), "tasks": 9}]})
        return send(client, method, *path, **options)

    monkeypatch.setattr(AdminClient, "request", change_before_patch)
    await shell.run("tenant", "update", "other", "--limit", "day:tasks=1", "--no-limit", "total")
    limits = {limit["window"]: limit["tasks"] for limit in (await shell.get_admin("/tenants/other"))["limits"]}
    assert limits == {"day": 1, "minute": 9, "hour": 9}


async def test_disable_and_enable(shell: Shell) -> None:
    """A disabled tenant gets no response but 403, until it is enabled."""
    assert (await shell.run("tenant", "disable", "shop")).stdout == "state:  active -> disabled\n"
    assert (await shell.gateway.call("GET", "/v1/quota")).status_code == 403
    assert (await shell.run("tenant", "enable", "shop")).stdout == "state:  disabled -> active\n"
    assert (await shell.gateway.call("GET", "/v1/quota")).status_code == 200


async def test_revoke_all(shell: Shell) -> None:
    """All tokens of a tenant are revoked at once."""
    tokens = [item["id"] for item in (await shell.get_admin("/tenants/shop"))["tokens"]]
    tokens.append((await shell.run_json("token", "create", "shop"))["id"])
    printed = (await shell.run("tenant", "revoke-all", "shop")).stdout
    assert sorted(printed.removeprefix("Revoked: ").strip().split(", ")) == sorted(tokens)
    assert (await shell.gateway.call("GET", "/v1/quota")).status_code == 401
    assert await shell.run_json("tenant", "revoke-all", "shop") == {"revoked": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "week:tasks=1"), "must begin with a window"),
        (("--limit", "day"), "must be a limit such as day:tasks=100"),
        (("--limit", "day:taks=1"), "must be a limit such as day:tasks=100"),
        (("--limit", "day:tasks=1,tasks=2"), "must be a limit such as day:tasks=100"),
        (("--limit", "day:tasks=-1"), "must limit tasks to a whole number"),
        (("--limit", "day:money=lots"), "must limit money to an amount in yuan"),
        (("--limit", "day:tasks=1", "--limit", "day:tasks=2"), "--limit names day more than once"),
        (("--limit", "day:tasks=1", "--no-limit", "day"), "--limit names day more than once"),
        (("--max-active", "1", "--no-max-active"), "Set or remove max active, not both"),
        (("--webhook-url", "https://hooks.test/", "--no-webhook"), "Set or remove webhook, not both"),
        (("--webhook-url", "https://hooks.test/", "--webhook-secret-file", "-"), "must be a file with a key"),
        (("--kind", "enlarge"), "must be upscale or"),
        (("--spending-mode", "all"), "must be count_only or count_then_money"),
    ],
)
async def test_usage_errors(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    """Usage errors are reported without a request."""
    before = shell.gateway.services.registry.current.version
    assert message in (await shell.run("tenant", "update", "shop", *arguments, code=2)).stderr
    assert shell.gateway.services.registry.current.version == before


async def test_quota(shell: Shell) -> None:
    """Each policy is shown with what remains, money in yuan."""
    assert (await shell.run("quota", "shop")).stdout == "It has no limits.\n"
    limits = ("--limit", "total:tasks=5,money=0.5", "--max-active", "3")
    await shell.run("tenant", "update", "shop", *limits)
    await shell.gateway.submit()
    assert (await shell.run_table("quota", "shop"))[1:] == [
        ["total-tasks", "tasks", "5", "1", "0", "4", "-", "-"],
        ["total-money", "yuan", "0.5", "0", "0.5", "0", "0", "-"],
        ["max-active", "active", "3", "1", "0", "2", "-", "-"],
    ]
    stored = await shell.get_admin("/tenants/shop")
    assert await shell.run_json("quota", "shop") == {"policies": stored["policies"]}
    assert '"limit": 5,' in (await shell.run("quota", "shop", "--json")).stdout  # no 5.0


async def test_show(shell: Shell) -> None:
    await shell.run("tenant", "update", "shop", "--max-active", "3")
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
