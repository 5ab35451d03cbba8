"""One run: traffic and faults for some seconds, then the audit."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import httpx2
from msgspec import Struct

from service.devstack import SANDBOX_USER_KEY
from tests.chaos.auditor import Auditor
from tests.chaos.faults import PROCESS_FAULTS, ProcessFaults
from tests.chaos.gateways import run_gateways
from tests.chaos.history import History
from tests.chaos.receiver import run_receiver
from tests.chaos.stores import run_store
from tests.chaos.traffic import (
    CALLER_FAULTS,
    OPERATOR_ACTIONS,
    TIMEOUT_SECONDS,
    Traffic,
    describe_accounts,
    describe_tenants,
)
from tests.chaos.vendor import VENDOR_FAULTS, Vendor, VendorAccount, run_vendor
from tests.support.network import reserve_port

ALL_FAULTS = (*VENDOR_FAULTS, *CALLER_FAULTS, *OPERATOR_ACTIONS, *PROCESS_FAULTS)


class Plan(Struct, frozen=True):
    """What to repeat a run: its seed, its length and its faults."""

    seed: int
    seconds: float
    topology: str = "single"
    faults: tuple[str, ...] = ALL_FAULTS

    @property
    def phases(self) -> list[tuple[float, frozenset[str]]]:
        """Seconds and faults until an audit each: the store is emptied last, since the loss excuses much."""
        faults = frozenset(self.faults)
        if "store-flushed" not in faults or self.topology != "single":
            return [(self.seconds, faults)]
        return [(0.7 * self.seconds, faults - {"store-flushed"}), (0.3 * self.seconds, faults)]

    @property
    def command(self) -> str:
        words = [f"CHAOS_SEED={self.seed}", f"CHAOS_SECONDS={self.seconds:.0f}"]
        if self.topology != "single":
            words.append(f"TOPOLOGY={self.topology}")
        if self.faults != ALL_FAULTS:
            words.append(f"CHAOS_FAULTS={','.join(self.faults)}")
        return " ".join(["make chaos", *words])


async def run_chaos(plan: Plan, folder: Path) -> tuple[History, Vendor]:
    """Run a plan; logs of the gateways and the store go to the folder."""
    faults = frozenset(plan.faults)
    history = History()
    vendor = Vendor(history, random.Random(f"{plan.seed} vendor"), frozenset())
    vendor.accounts = describe_accounts() | {SANDBOX_USER_KEY: VendorAccount(SANDBOX_USER_KEY)}
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(run_receiver())
        await stack.enter_async_context(run_vendor(vendor))
        store = await stack.enter_async_context(run_store(plan.topology, folder))
        upstream = {"GATEWAY_UPSTREAM_URL": vendor.url, "GATEWAY_UPSTREAM_USER_KEY": SANDBOX_USER_KEY}
        settings = {**store.settings, **upstream}
        gateways = await stack.enter_async_context(run_gateways(folder, settings))
        client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False, timeout=TIMEOUT_SECONDS))
        tenants = describe_tenants()
        traffic = Traffic(history, vendor, gateways, tenants, plan.seed, faults, client)
        await traffic.set_up(receiver.url, f"http://127.0.0.1:{reserve_port()}")
        process_faults = ProcessFaults(history, gateways, store, receiver, faults, plan.seed, plan.topology, vendor)
        auditor = Auditor(history, vendor, gateways, receiver, process_faults, tenants)
        for number, (seconds, injected) in enumerate(plan.phases):
            process_faults.faults, vendor.faults = injected, injected
            traffic.is_over = process_faults.is_over = False
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(auditor.watch_limits())
                running = [group.create_task(traffic.run(number)), group.create_task(process_faults.run(number))]
                await asyncio.sleep(seconds)
                traffic.is_over = process_faults.is_over = True
                await asyncio.wait(running)
                watching.cancel()
            vendor.faults = frozenset()
            await auditor.audit()
            if history.violations:
                break
    return history, vendor


def run_once(plan: Plan) -> tuple[History, Vendor]:
    """Run a plan; the folder with the logs stays if it broke a rule or could not end."""
    folder = tempfile.mkdtemp(prefix="chaos-")
    history, vendor = asyncio.run(run_chaos(plan, Path(folder)))
    if history.violations:
        history.folder = folder
    else:
        shutil.rmtree(folder)
    return history, vendor
