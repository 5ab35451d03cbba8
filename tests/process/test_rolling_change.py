"""Two gateways are replaced, one after the other, under the load of 50 clients."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.process.balanced_clients import Load, Site
from tests.process.gateway import HTTP, TIMEOUT_SECONDS, GatewayProcess, start_gateway, wait_until
from tests.process.sandbox import SandboxProcess, call_admin, run_sandbox
from tests.support.valkey import Valkey

CLIENTS = 50
EXIT_SECONDS = 5.0
LEASE_SECONDS = 90
SENDING_SECONDS = 4
SLOW_SECONDS = 2.5
SHORT_SENDING_PROGRAM = f"""
from service.cli import main
from service.usecases import submit
submit.LEASE_MARGIN_SECONDS = {LEASE_SECONDS - SENDING_SECONDS}
main(["serve"])
"""
SLOW, SILENT = "slow", "silent"
"""Keys of the accounts whose submits take long, or get no response."""


@dataclass
class Rollout:
    """The gateways of one store and upstream under load."""

    load: Load
    upstream: SandboxProcess
    start: Callable[[], GatewayProcess]

    async def replace(self, site: Site) -> None:
        """End a gateway that has held uploads, and start another one."""
        old, load = site.gateway, self.load
        site.is_signalled, signalled_at = True, time.monotonic()
        old.process.send_signal(signal.SIGTERM)
        await wait_in_thread(lambda: HTTP.get(f"{old.ops_url}/readyz").status_code == 503, "the draining")
        site.is_draining = True
        assert (await asyncio.to_thread(HTTP.get, f"{old.ops_url}/healthz")).status_code == 200
        await wait_in_thread(lambda: site.has_refused, "the end of listening")
        load.release_uploads()
        assert await asyncio.to_thread(old.process.wait, TIMEOUT_SECONDS) == 0
        exited_at = time.monotonic()
        assert exited_at - max(signalled_at, site.last_submission_at) < EXIT_SECONDS
        log = old.log_path.read_text()
        assert ("Traceback" in log, "shutdown.overdue" in log, "ASGI" in log) == (False, False, False)
        new = Site(self.start())
        await asyncio.to_thread(new.gateway.wait_ready)
        load.sites[load.sites.index(site)] = new

    async def wait_for_work(self, site: Site) -> None:
        """Wait for a random number of responses, and for an upload that the site has begun to read."""
        responses = self.load.counts["responses"] + random.randrange(100, 300)
        await wait_in_thread(
            lambda: self.load.counts["responses"] > responses and site.held_uploads > 0, "a moment of work"
        )

    def count_submits(self, *user_keys: str) -> Counter[str]:
        """Count the submits that the upstream has received from these accounts, by prompt."""
        records = HTTP.get(f"{self.upstream.url}/_control/requests").json()
        return Counter(
            item["fields"]["prompt"]
            for item in records
            if item["operation"] == "submit" and item["user_key"] in user_keys
        )


async def wait_in_thread(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


def has_quota(gateway: GatewayProcess, token: str, used: int) -> bool:
    """Return whether so many tasks are used, and none is held or active."""
    response = HTTP.get(f"{gateway.url}/v1/quota", headers={"Authorization": f"Bearer {token}"})
    policies = response.json().get("policies", ())
    return [(item["used"], item["reserved"]) for item in policies] == [(used, 0), (0, 0)]


def create_tenant(upstream: SandboxProcess, gateway: GatewayProcess, name: str, user_key: str) -> str:
    """Create a tenant on an account of the same name; return a token."""
    HTTP.put(f"{upstream.url}/_control/accounts/{user_key}", json={"count": 9_999, "money": 0}).raise_for_status()
    call_admin(gateway, "PUT", f"/accounts/{name}", json={"user_key": user_key})
    policy = {"limits": [{"window": "total", "tasks": 9_999}], "max_active": 9_999}
    call_admin(gateway, "PUT", f"/tenants/{name}", json={"accounts": [name], **policy})
    token: str = call_admin(gateway, "POST", f"/tenants/{name}/tokens")["token"]
    return token


async def test_no_accepted_request_fails(tmp_path: Path, valkey: Valkey) -> None:
    with run_sandbox() as upstream, ExitStack() as stack:
        settings = upstream.gateway_settings(valkey) | {
            "GATEWAY_LEASE_SECONDS": str(LEASE_SECONDS),
            "GATEWAY_POLL_SECONDS": "0.2",
            "GATEWAY_READS_PER_SECOND": "0",
        }
        words = [sys.executable, "-c", SHORT_SENDING_PROGRAM]
        folders = (tmp_path / str(number) for number in range(4))

        def start() -> GatewayProcess:
            return stack.enter_context(start_gateway(next(folders), words, **settings))

        sites = [Site(start()), Site(start())]
        first, second = sites
        for site in sites:
            site.gateway.wait_ready()
        tokens = {key: create_tenant(upstream, first.gateway, f"shop-{key}", key) for key in ("shop", SLOW, SILENT)}
        for token in tokens.values():
            for site in sites:
                wait_until(partial(has_quota, site.gateway, token, 0), "news of a tenant")
        slow = {"on": "submit", "user_key": SLOW, "latency": SLOW_SECONDS}
        silent = {"on": "submit", "user_key": SILENT, "reply": "hang"}
        upstream.set_faults(slow, silent, {"on": "submit", "latency": 0.2}, seconds=0.5)
        load = Load(sites, tokens["shop"])
        rollout = Rollout(load, upstream, start)
        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(load.run_client())
                await rollout.wait_for_work(first)
                await rollout.replace(first)
                await rollout.wait_for_work(second)
                pending = [
                    clients.create_task(load.submit(key, only=second, token=tokens[key])) for key in (SLOW, SILENT)
                ]
                await wait_in_thread(lambda: rollout.count_submits(SLOW, SILENT).total() == 2, "two submits")
                await rollout.replace(second)
                await rollout.wait_for_work(load.sites[0])
                load.is_ending = True
                load.release_uploads()
        finally:
            await load.close()
        statuses = [reply.result().status for reply in pending]
        assert statuses == [201, 504]
        assert rollout.count_submits("shop") == Counter(list(load.tasks))
        for key, used in (("shop", len(load.tasks)), (SLOW, 1), (SILENT, 1)):
            ended = partial(has_quota, load.sites[0].gateway, tokens[key], used)
            await wait_in_thread(ended, "the end of all tasks")
        logs = "".join(path.read_text() for path in tmp_path.glob("*/log.txt"))
        assert not [item for item in load.unanswered if item in logs]
        for what in ("unfinished waits", "unfinished streams", "resumed streams", "late responses", "downloads"):
            assert load.counts[what], load.counts
