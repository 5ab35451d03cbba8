"""Faults of processes: gateways, store and receiver are killed, stopped, cut off, filled, emptied and set back."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from service.storage.redis import Keys
from tests.chaos.gateways import Gateways
from tests.chaos.history import History
from tests.chaos.receiver import Receiver
from tests.chaos.stores import DOWN_AFTER_MS, SingleStore, Store
from tests.chaos.vendor import Vendor
from tests.support.proxy import Proxy

LEASE_SECONDS = 180
_KEYS = Keys("gw")
_COMMAND_SECONDS = 60.0
GATEWAY_FAULTS = ("gateway-killed", "gateway-stopped", "gateway-terminated")
STORE_FAULTS = (
    "store-killed",
    "store-stopped",
    "store-stalled",
    "store-full",
    "store-flushed",
    "store-all-killed",
    "clock-back",
    "connections-cut",
    "answers-lost",
)
RECEIVER_FAULTS = ("receiver-dead",)
PROCESS_FAULTS = (*GATEWAY_FAULTS, *STORE_FAULTS, *RECEIVER_FAULTS)
_SINGLE_ONLY = {"store-stalled", "store-flushed", "connections-cut", "answers-lost"}
_REPLICATED_ONLY = {"store-all-killed"}
_MAX_FLUSHES = 2
_BACK_INTERVAL_SECONDS = 100
"""The counter of the window before the current one is kept, of earlier ones not: two steps must not add up."""
Action = Callable[[random.Random], Coroutine[Any, Any, None]]


@dataclass
class ProcessFaults:
    """Injects faults until `is_over`: of gateways, store and receiver side by side, each one at a time."""

    history: History
    gateways: Gateways
    store: Store
    receiver: Receiver
    faults: frozenset[str]
    seed: int
    topology: str
    vendor: Vendor
    is_over: bool = False
    _shift_seconds: int = 0
    _stepped_back_at: float = 0

    async def run(self, phase: int) -> None:
        gateway: Mapping[str, Action] = {
            "gateway-killed": self._kill_gateway,
            "gateway-stopped": self._stop_gateway,
            "gateway-terminated": self._terminate_gateway,
        }
        store: Mapping[str, Action] = {
            "store-killed": self._kill_store,
            "store-stopped": self._stop_store,
            "store-stalled": self._stall_store,
            "store-full": self._fill_store,
            "store-flushed": self._flush_store,
            "store-all-killed": self._kill_all,
            "clock-back": self._step_back,
            "connections-cut": self._cut_connections,
            "answers-lost": self._lose_answers,
        }
        async with asyncio.TaskGroup() as group:
            group.create_task(self._inject(gateway, 1.5, phase))
            group.create_task(self._inject(store, 2, phase))
            group.create_task(self._inject({"receiver-dead": self._kill_receiver}, 5, phase))

    async def _inject(self, actions: Mapping[str, Action], interval_seconds: float, phase: int) -> None:
        excluded = _REPLICATED_ONLY if self.topology == "single" else _SINGLE_ONLY
        names = [name for name in actions if name in self.faults and name not in excluded]
        randomness, remaining = random.Random(f"{self.seed} {phase} {interval_seconds}"), list[str]()
        while names:
            await self._pause(randomness.expovariate(1 / interval_seconds))
            if self.is_over:
                return
            if not remaining:  # each once, so that a short run has them all
                remaining = randomness.sample(names, len(names))
                if "store-flushed" in remaining:  # of a short last phase too
                    remaining.remove("store-flushed")
                    remaining.append("store-flushed")
            name = remaining.pop()
            if self._is_due(name):
                await self._wait_for_submit(randomness)
                with self.history.record_fault(name):
                    await actions[name](randomness)

    def _is_due(self, name: str) -> bool:
        if name == "store-flushed":
            return len(self.history.flushed_at) < _MAX_FLUSHES
        return name != "clock-back" or time.monotonic() - self._stepped_back_at > _BACK_INTERVAL_SECONDS

    async def _wait_for_submit(self, randomness: random.Random) -> None:
        """Wait for the time in which the vendor has a submit, its answer is under way, or it is settled."""
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self.vendor.next_submit.wait()
        await asyncio.sleep(randomness.uniform(0, 0.05))

    async def _pause(self, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        while not self.is_over and time.monotonic() < ends_at:
            await asyncio.sleep(0.1)

    @property
    def _proxy(self) -> Proxy:
        assert isinstance(self.store, SingleStore)
        return self.store.proxy

    async def _execute(self, *command: str) -> Any:
        """Run a command on the primary, again until there is one that answers."""
        async with asyncio.timeout(_COMMAND_SECONDS):
            while True:
                try:
                    return await self.store.execute(*command)
                except (RedisError, OSError):
                    await asyncio.sleep(0.05)

    async def advance_clock(self, seconds: int) -> None:
        """Move the store's clock, forward or back."""
        self._shift_seconds += seconds
        if seconds > LEASE_SECONDS:
            self.history.advanced_at.append(time.monotonic())
        await self._execute("SET", f"{_KEYS.clock}:server", f"+{self._shift_seconds}")

    async def _kill_gateway(self, randomness: random.Random) -> None:
        gateway = randomness.choice(self.gateways.members)
        await gateway.end(signal.SIGKILL)
        await gateway.start()

    async def _terminate_gateway(self, randomness: random.Random) -> None:
        gateway = randomness.choice(self.gateways.members)
        code = await gateway.end(signal.SIGTERM)
        if code != 0:
            self.history.add_violation("wrong exit", f"the gateway {gateway.role} ended with {code} after SIGTERM")
        await gateway.start()

    async def _stop_gateway(self, randomness: random.Random) -> None:
        """Stop a process for longer than the lease of its submissions: the clock is advanced meanwhile."""
        gateway = randomness.choice(self.gateways.members)
        gateway.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(randomness.uniform(0.2, 1))
            await self.advance_clock(LEASE_SECONDS + 20)
            await asyncio.sleep(randomness.uniform(0.2, 6))
        finally:
            gateway.send_signal(signal.SIGCONT)

    async def _kill_store(self, randomness: random.Random) -> None:
        await self.store.kill_primary()
        if self.topology != "single":
            # A primary that is back while another one is promoted acknowledges writes that are lost afterwards.
            await self.store.wait_writable()
        await asyncio.sleep(randomness.uniform(0.1, 3))
        await self.store.restart()

    async def _kill_all(self, randomness: random.Random) -> None:
        await self.store.kill_all()
        # Shorter than a failover takes: a primary that is back meanwhile acknowledges writes that are lost.
        await asyncio.sleep(randomness.uniform(0.1, 0.5 * DOWN_AFTER_MS / 1000))
        await self.store.restart()

    async def _stop_store(self, randomness: random.Random) -> None:
        await self.store.suspend()
        try:
            # With replicas shorter than a failover takes, in which a suspended primary loses what it acknowledges.
            longest = 7 if self.topology == "single" else 0.5 * DOWN_AFTER_MS / 1000
            await asyncio.sleep(randomness.uniform(0.1, longest))
        finally:
            await self.store.resume()
        await self.store.wait_writable()

    async def _fill_store(self, randomness: random.Random) -> None:
        await self._execute("CONFIG", "SET", "maxmemory", "1")
        await asyncio.sleep(randomness.uniform(0.2, 3))
        await self._execute("CONFIG", "SET", "maxmemory", "0")

    async def _flush_store(self, randomness: random.Random) -> None:
        """Empty the store, and wait until a gateway has written accounts and tenants again."""
        self.history.flushed_at.append(time.monotonic())
        await self._execute("FLUSHALL")
        await self.advance_clock(0)
        async with asyncio.timeout(_COMMAND_SECONDS):
            while not await self._execute("EXISTS", _KEYS.registry):
                await asyncio.sleep(0.05)
        await asyncio.sleep(randomness.uniform(0.5, 2))

    async def _step_back(self, randomness: random.Random) -> None:
        self._stepped_back_at = time.monotonic()
        await self.advance_clock(-randomness.randint(1, 50))

    async def _stall_store(self, randomness: random.Random) -> None:
        await self._proxy.stall(randomness.uniform(0.2, 7))

    async def _cut_connections(self, _: random.Random) -> None:
        await self._proxy.cut()

    async def _lose_answers(self, randomness: random.Random) -> None:
        await self._proxy.lose_answers(randomness.uniform(0.05, 0.5))

    async def _kill_receiver(self, randomness: random.Random) -> None:
        self.receiver.is_dead = True
        await self._pause(randomness.uniform(0.5, 5))
        self.receiver.is_dead = False
