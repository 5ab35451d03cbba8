"""A store with many tenants and tasks, which are copies of real ones, and the bytes that they take."""

from __future__ import annotations

import secrets
import time
from typing import Any

from msgspec import msgpack
from msgspec.structs import replace
from redis import Redis

from service.client import GatewayClient
from service.container import TASK_ID_PURPOSE
from service.crypto import Keyring, TaskIdCodec, parse_secret_key
from service.domain.tasks import TaskReference
from service.domain.tenants import generate_token, hash_token
from service.storage.redis import DAY_MS, Keys
from tests.bench.comparison import TENANT, Environment
from tests.bench.peers.servers import USER_KEY, Server
from tests.process.gateway import wait_until
from tests.support.images import make_png

FINISHED, RUNNING = "finished", "running"
USAGE_DAYS = 31
_OWNER, _SUBMITTER = "shop", "press"
_BATCH_SIZE = 1_000
_COPY_TASKS = """
local task, keep_ms = cmsgpack.unpack(redis.call('GET', KEYS[1])), redis.call('PTTL', KEYS[1])
for index = 3, #ARGV, 3 do
  local id = ARGV[index]
  task.id, task.created_at = ARGV[index + 1], tonumber(ARGV[index + 2])
  redis.call('SET', ARGV[1] .. id, cmsgpack.pack(task), 'PX', keep_ms)
  redis.call('COPY', KEYS[2], ARGV[2] .. id)
  for position = 3, #KEYS do
    redis.call('ZADD', KEYS[position], task.created_at, id)
  end
end
"""
"""KEYS: a task, its reservation, sorted sets; ARGV: the prefixes of both keys, then id, task id, time of each copy."""
_SCHEDULE_CHECKS = """
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  redis.call('ZADD', KEYS[1], ARGV[1], id)
  redis.call('SET', ARGV[2] .. id, '', 'PX', ARGV[3])
end
"""
"""KEYS: the running tasks; ARGV: when they are due, the prefix of the marks of watched tasks and their time to live."""
_REMOVE_TASKS = """
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  redis.call('DEL', ARGV[1] .. id, ARGV[2] .. id)
  redis.call('ZREM', KEYS[2], id)
end
redis.call('DEL', KEYS[1])
"""


class GrowingStore:
    """A store whose tenants all have counters and a month of usage. One of them has all tasks, another one submits."""

    def __init__(self, env: Environment, client: Redis) -> None:
        self._env = env
        self._client: Any = client
        self._keys = Keys("gw")
        self._task_ids = TaskIdCodec(Keyring([parse_secret_key(env.secret_key)]).derive(TASK_ID_PURPOSE))
        self._originals: dict[str, TaskReference] = {}
        self._tenant_ids: dict[str, int] = {}
        self.submitter_token = ""
        self.task_ids: dict[str, list[str]] = {FINISHED: [], RUNNING: []}
        """The ids of the copies."""

    def create_originals(self, server: Server, finishing: Server) -> None:
        """Let the tenant submit a task of each kind to a vendor that ends them, and one to the usual one."""
        with self._env.open_admin(server.ops_url) as http, GatewayClient(server.url, server.token) as tenant:
            account = {"user_key": USER_KEY, "base_url": finishing.url}
            http.put("/accounts/finishing", json=account).raise_for_status()
            http.put(f"/tenants/{_OWNER}", json=TENANT | {"accounts": ["finishing"]}).raise_for_status()
            for kind in ("vectorize", "face-enhance", "seamless"):  # so that the usage of the day has all kinds
                tenant.wait(tenant.submit(kind, make_png()))
            ended = tenant.wait(self._submit(tenant))
            http.put(f"/tenants/{_OWNER}", json=TENANT).raise_for_status()
            running = self._submit(tenant)
            wait_until(lambda: tenant.get_task(running.id).state == RUNNING, "the check of a task")
            http.put(f"/tenants/{_SUBMITTER}", json=TENANT | {"accounts": ["finishing"]}).raise_for_status()
            created = http.post(f"/tenants/{_SUBMITTER}/tokens", json={}).raise_for_status()
        self.submitter_token = str(created.json()["token"])
        for state, task in ((FINISHED, ended), (RUNNING, running)):
            self._originals[state] = self._task_ids.decode(task.id)

    @staticmethod
    def _submit(tenant: GatewayClient) -> Any:
        """Submit a task with typical options."""
        prompt, metadata = "a lighthouse at dusk, film grain", {"order": "2026-004217"}
        return tenant.submit("upscale", make_png(), metadata=metadata, scale=2, prompt=prompt)

    def add_tenants(self, server: Server, number: int) -> int:
        """Apply a registry with more tenants, until there are so many; return how many were added."""
        tenants = {}
        for index in range(max(len(self._tenant_ids), 2), number):
            token = {"sha256": hash_token(generate_token()).hex()}
            tenants[f"tenant-{index:04}"] = TENANT | {"tokens": {secrets.token_hex(6): token}}
        with self._env.open_admin(server.ops_url) as http:
            http.put("/registry", json={"tenants": tenants}).raise_for_status()
            entries = http.get("/registry").raise_for_status().json()["tenants"]
        former, self._tenant_ids = self._tenant_ids, {name: entry["id"] for name, entry in entries.items()}
        today, owner = int(time.time() * 1000) // DAY_MS, self._tenant_ids[_OWNER]
        counters = self._client.hgetall(self._keys.tenant(owner))
        del counters[b"policy"]
        pipeline, added = self._client.pipeline(transaction=False), self._tenant_ids.keys() - former.keys()
        for tenant in (self._tenant_ids[name] for name in added):
            pipeline.hset(self._keys.tenant(tenant), mapping=counters)
            for day in range(today - USAGE_DAYS + 1, today + 1):
                if (tenant, day) != (owner, today):
                    pipeline.copy(self._keys.usage(owner, today), self._keys.usage(tenant, day))
        pipeline.execute()
        return len(added)

    def add_tasks(self, number: int) -> int:
        """Copy tasks until there are so many of each state; return how many of each were added."""
        added, script = number - len(self.task_ids[RUNNING]), self._client.register_script(_COPY_TASKS)
        for state, sorted_sets in ((FINISHED, []), (RUNNING, [self._keys.poll_due])):
            original, task_ids = self._originals[state], self.task_ids[state]
            keys = [self._keys.task(original.reservation), self._keys.reservation(original.reservation)]
            keys += [self._keys.tenant_tasks(original.tenant), *sorted_sets]
            while missing := min(number - len(task_ids), _BATCH_SIZE):
                arguments: list[Any] = [self._keys.task(""), self._keys.reservation("")]
                for _ in range(missing):
                    reservation, created_at = secrets.token_hex(16), original.created_at - len(task_ids)
                    copy = replace(original, reservation=reservation, created_at=created_at)
                    task_ids.append(self._task_ids.encode(copy))
                    arguments += [reservation, task_ids[-1], created_at]
                script(keys, arguments)
        self._client.waitaof(1, 0, 10_000)  # so that writing them to the disk does not count as work of what follows
        return added

    def schedule_checks(self, in_seconds: float) -> None:
        """Let all running tasks be due then, and after that at the shortest interval."""
        due_at = int((time.time() + in_seconds) * 1000)
        script = self._client.register_script(_SCHEDULE_CHECKS)
        script([self._keys.poll_due], [due_at, self._keys.poll_watched(""), 15_000])

    def count_running(self) -> int:
        """Return the number of the tasks that are checked, of those beside the copies."""
        running = self._client.zcard(self._keys.poll_due) + self._client.zcard(self._keys.poll_claimed)
        return int(running) - len(self.task_ids[RUNNING]) - 1

    def publish_changes(self, number: int) -> int:
        """Publish changes of a task, as another process would do."""
        reservation = self._originals[RUNNING].reservation
        task = self._client.get(self._keys.task(reservation))
        message = b"\x93" + msgpack.encode(reservation) + msgpack.encode(int(time.time() * 1000)) + task
        pipeline = self._client.pipeline(transaction=False)
        for _ in range(number):
            pipeline.publish(self._keys.task_events_channel, message)
        pipeline.execute()
        return number

    def remove_submissions(self) -> None:
        """Remove the tasks that were submitted, so that only the copies remain."""
        keys = [self._keys.tenant_tasks(self._tenant_ids[_SUBMITTER]), self._keys.poll_due]
        self._client.register_script(_REMOVE_TASKS)(keys, [self._keys.task(""), self._keys.reservation("")])

    def outdate_registry(self) -> None:
        """Let each process find a newer version of the registry."""
        self._client.hincrby(self._keys.registry, "version", 1)

    def used_bytes(self) -> int:
        return int(self._client.info("memory")["used_memory"])

    def measure_parts(self) -> dict[str, float]:
        """Return the bytes of the parts of one tenant and of one task."""
        ended, running = (self._originals[state] for state in (FINISHED, RUNNING))
        usage, state = self._client.memory_usage, self._keys.tenant(ended.tenant)
        index = self._keys.tenant_tasks(ended.tenant)
        idempotency = next(self._client.scan_iter(self._keys.idempotency(ended.tenant, "") + "*", count=10_000))
        return {
            "tenant's counters": usage(state),
            "tenant in the registry": usage(self._keys.registry, samples=0) / len(self._tenant_ids),
            "usage of a tenant's day": usage(self._keys.usage(ended.tenant, int(time.time() * 1000) // DAY_MS)),
            "finished task": usage(self._keys.task(ended.reservation)),
            "running task": usage(self._keys.task(running.reservation)),
            "reservation of a finished task": usage(self._keys.reservation(ended.reservation)),
            "reservation of a running task": usage(self._keys.reservation(running.reservation)),
            "entry in the tenant's list": usage(index, samples=0) / self._client.zcard(index),
            "entry in the queue of checks": usage(self._keys.poll_due, samples=0)
            / self._client.zcard(self._keys.poll_due),
            "idempotency key": usage(idempotency),
        }
