"""`gateway top`: its figures of gateways that are away or restart, and its form on terminals of any size."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest
from rich.cells import cell_len
from rich.console import Console

from service.cli.monitor import (
    AccountFigures,
    Figures,
    GatewayFigures,
    Monitor,
    Spending,
    TaskFigures,
    TenantFigures,
    days_left,
    mean_per_day,
)
from service.cli.scrape import Target
from service.cli.screen import render_figures
from tests.behaviour.gateway_fixture import ADMIN_TOKEN
from tests.cli.conftest import UNREACHABLE_URL, Shell
from tests.contract.scripted_server import Connection, http_response, run_server

REQUESTS = "gateway_http_requests_total"


@asynccontextmanager
async def open_monitor(*urls: str, token: str = ADMIN_TOKEN) -> AsyncIterator[Monitor]:
    monitor = Monitor(urls, token, None)
    try:
        yield monitor
    finally:
        await monitor.aclose()


async def test_figures_of_a_gateway(shell: Shell) -> None:
    gateway = shell.gateway
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 2}])
    await gateway.upstream.set_balance(count=50, money=7)
    async with open_monitor(gateway.ops_url, UNREACHABLE_URL) as monitor:
        await monitor.refresh()
        assert monitor.figures().gateways[0].requests_per_second is None  # it takes two reads
        for _ in range(2):
            await gateway.submit()
        await gateway.call("GET", "/v1/nothing")
        assert (await gateway.call("POST", "/v1/tasks/face-enhance", files={"image": b""})).status_code == 422
        await gateway.upstream.keep_running()
        await monitor.refresh()
        figures = monitor.figures()
    running, away = figures.gateways
    assert away.error == "Connection refused"
    assert running.requests_per_second
    assert all(running.requests_per_second[name] > 0 for name in ("2xx", "4xx"))
    assert running.requests_per_second["5xx"] == 0
    assert figures.tasks
    assert (sum(figures.tasks.running.values()), figures.tasks.polled, figures.warnings) == (2, 2, [])
    (account,) = figures.accounts or ()
    assert (account.name, account.state, account.in_flight, account.yuan) == ("main", "open", 2, 7)
    (tenant,) = figures.tenants or ()
    assert (tenant.name, tenant.running, tenant.nearest_limit, tenant.used_ratio) == ("shop", 2, "total-tasks", 1)


async def test_denials_and_days_left(shell: Shell) -> None:
    gateway = shell.gateway
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 2}])
    await gateway.upstream.set_balance(count=50, money=7)
    async with open_monitor(gateway.ops_url) as monitor:
        await gateway.submit()
        await gateway.upstream.wait_until_idle()
        await gateway.poll_due_tasks()
        await monitor.refresh()
        await gateway.submit()
        assert (await gateway.submit()).status_code == 429
        await monitor.refresh()
        figures = monitor.figures()
    (account,) = figures.accounts or ()
    assert account.uses_days == account.uses  # one use, today
    (tenant,) = figures.tenants or ()
    assert tenant.denials_per_minute["total-tasks"] > 0


async def test_token_that_may_not_read_the_usage(shell: Shell) -> None:
    async with open_monitor(shell.gateway.ops_url, token="wrong") as monitor:
        await monitor.refresh()
        (warning,) = monitor.figures().warnings
    assert "HTTP 401" in warning


async def test_restart_and_absence() -> None:
    """Counters of a new process began at 0. What was before an absence counts as one interval."""
    replies: list[bytes] = []

    async def serve(connection: Connection) -> None:
        await connection.receive()
        await connection.send(replies.pop(0))

    def metrics(start: int, requests: int) -> bytes:
        lines = (
            'gateway_build_info{version="1",python="3"} 1',
            f"process_start_time_seconds {start}",
            f'{REQUESTS}{{port="tenants",status="200"}} {requests}',
            "",
        )
        return http_response("\n".join(lines).encode())

    replies += [metrics(1, 100), metrics(1, 130), http_response(b"", 503), b"", http_response(b"hi"), metrics(2, 7)]
    errors, increases = [], []
    async with run_server(serve) as peer, httpx2.AsyncClient(trust_env=False) as http:
        target = Target(peer.url, http, None)
        while replies:
            before = target.read_at
            await target.refresh()
            errors.append(target.error)
            if target.error is None and (rates := target.last_rates(REQUESTS)):
                increases.append(round(rates[0][1] * (target.read_at - before)))
    assert [error is None for error in errors] == [True, True, False, False, False, True]
    assert increases == [30, 7]


def test_mean_spending_starts_with_the_first_day_and_is_over_a_day_at_least() -> None:
    def row(day: int, count: int, money: float) -> dict[str, Any]:
        spent = {"observed": {"count": count, "money": 0}, "estimated": {"count": 0, "money": money}}
        return {"tenant": "shop", "period": f"2026-03-{day:02}", "spent": spent}

    noon = datetime(2026, 3, 8, 12, tzinfo=UTC)
    assert mean_per_day([row(8, 6, 3)], noon) == {"shop": (6, 3)}
    assert mean_per_day([row(1, 0, 0), row(7, 6, 0), row(8, 0, 3)], noon) == {"shop": (4, 2)}


def test_days_left_is_of_the_account_that_each_tenant_uses_now() -> None:
    spending = Spending(
        {"shop": (2, 0), "press": (1, 4), "gone": (9, 9)}, {"shop": ["a", "b"], "press": ["b"], "idle": ["a"]}
    )
    assert spending.by_account({"a", "b"}) == {"a": (2, 0), "b": (1, 4)}
    assert spending.by_account({"b"}) == {"b": (3, 4)}
    assert spending.by_account(set()) == {"a": (2, 0), "b": (1, 4)}
    assert [days_left(*each) for each in ((10, 4, 2), (3, 4, 2), (10, None, 0), (None, 0, 2))] == [3, 0, None, None]


def make_figures(gateways: int = 2, accounts: int = 3, tenants: int = 40) -> Figures:
    """Return figures with every style, long names and a wide text."""
    rates = {"2xx": 12_345.678, "4xx": 1.0, "5xx": 0.5}
    return Figures(
        at=datetime(2026, 3, 8, tzinfo=UTC),
        gateways=[
            GatewayFigures(
                url=f"http://gateway-{number}.images.svc.cluster.local:8081",
                version="0.5.0",
                started_at=datetime(2026, 3, 7, tzinfo=UTC),
                requests_per_second=rates,
                in_progress=9,
                uploads=3,
                upload_bytes=80 << 20,
                upload_limit_bytes=90 << 20,
            )
            for number in range(gateways - 1)
        ]
        + [GatewayFigures(url="http://[::1]:8081", error="Connection refused")],
        tasks=TaskFigures({"upscale": 7, "seamless": 0}, 7, 61.0, 0.25),
        accounts=[
            AccountFigures(
                name=f"账户-{number}",
                state="open" if number else "exhausted",
                uses=10.0 * number,
                uses_days=3.0 * number,
                yuan=None,
                yuan_days=None,
                in_flight=1,
                unknown=number,
            )
            for number in range(accounts)
        ],
        tenants=[
            TenantFigures(
                name=f"tenant-{number:02}",
                running=number,
                denials_per_minute={"day-tasks": 1.5} if number == 39 else {},
                nearest_limit="day-tasks",
                used_ratio=number / 40,
            )
            for number in range(tenants)
        ],
        warnings=["the days left are unknown: HTTP 401: Authentication required"],
    )


def render_lines(figures: Figures, width: int, height: int | None) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width).print(render_figures(figures, width, height))
    return output.getvalue().splitlines()


@pytest.mark.parametrize("width", [24, 40, 80, 120, 300])
@pytest.mark.parametrize("height", [16, 24, 60, None])
def test_figures_fit_the_terminal(width: int, height: int | None) -> None:
    """What does not fit is left out by rank, and counted; the worst comes first."""
    lines = render_lines(make_figures(), width, height)
    assert all(cell_len(line) <= width for line in lines)
    assert height is None or len(lines) <= height
    heads = [line.split() for line in lines if line.startswith(("GATEWAY", "ACCOUNT", "TENANT"))]
    assert [head[0] for head in heads] == ["GATEWAY", "ACCOUNT", "TENANT"]
    first_rows = [lines[index + 1].split()[0] for index, line in enumerate(lines) if line.startswith(("ACC", "TEN"))]
    assert first_rows == ["账户-0", "tenant-39"]
    assert (height in {16, 24}) == any("more" in line for line in lines)
    if width >= 120:
        assert not any(cell.endswith("…") and cell != "…" for line in lines for cell in line.split())
        assert {"VERSION", "UNKNOWN", "OF"} <= {name for head in heads for name in head}


def test_figures_while_all_are_away() -> None:
    figures = Figures(
        at=datetime(2026, 3, 8, tzinfo=UTC), tasks=None, accounts=None, tenants=None, warnings=[], gateways=[]
    )
    assert render_lines(figures, 80, 24) == ["00:00:00Z  0 of 0 up"]


async def test_once(shell: Shell) -> None:
    """It prints a table or JSON, also without a terminal, and fails if no gateway responds."""
    for arguments in ((), ("--once",)):
        printed = (await shell.run("top", "--interval", "0.5", *arguments)).stdout
        assert "ACCOUNT" in printed
        assert "\x1b" not in printed
    figures = await shell.run_json("top", "--once", "--interval", "0.5")
    assert set(figures) == {"at", "gateways", "tasks", "accounts", "tenants", "warnings"}
    failed = await shell.run("top", "--once", "--json", "--interval", "0.5", "--url", UNREACHABLE_URL, code=1)
    assert json.loads(failed.stdout)["gateways"][0]["error"] == "Connection refused"
    assert "Connection refused" in failed.stderr
    assert "is no address" in (await shell.run("top", "--url", "ftp://x", code=1)).stderr


async def test_terminal_is_drawn_again_until_ctrl_c(shell: Shell) -> None:
    ours, theirs = pty.openpty()
    own_url, away_url = shell.gateway.ops_url, UNREACHABLE_URL
    environ = os.environ | shell.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "top", "--interval", "0.5", "--url", own_url, "--url", away_url),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environ,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # the terminal, whose Ctrl-C it receives
    )
    os.close(theirs)
    output = b""
    try:
        while output.count(b"1 of 2 up") < 2:  # it is drawn again
            output += await asyncio.to_thread(os.read, ours, 10_000)
        os.write(ours, b"\x03")
        with suppress(OSError):  # EIO: the process has closed its terminal
            while True:
                output += await asyncio.to_thread(os.read, ours, 10_000)
        assert await process.wait() == 0
    finally:
        os.close(ours)
    assert output.count(b"\x1b[?1049h") == output.count(b"\x1b[?1049l") == 1  # the screen is as before
    assert b"Traceback" not in output


def test_only_top_loads_what_draws_it() -> None:
    """A gateway would need 3 MB more with it."""
    script = (
        "import sys; from service.cli import main\n"
        "for name in ('serve', 'top'): main.commands[name].make_context(name, [], resilient_parsing=True)\n"
        "assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
