"""A gateway served over HTTP, over a real Valkey and the sandbox."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from httpx2 import AsyncClient, Response
from msgspec.structs import replace
from redis import Redis

from service.app import create_app, create_ops_app
from service.container import Container, open_container
from service.sandbox.app import SandboxConfig, SandboxControl, open_sandbox
from service.sandbox.faults import Behaviour, Fault
from service.sandbox.store import AccountBalance
from service.settings import Settings
from service.storage.connections import connect
from service.storage.redis import DAY_MS, Keys
from service.telemetry.redaction import Redactor
from service.usecases.ports import SubmitOutcome, SubmitResult
from tests.support.images import make_png
from tests.support.network import serve_app
from tests.support.server_time import install_server_time, read_server_time, set_server_time, shift_server_time
from tests.support.valkey import Valkey

USER_KEY = "upstream-key-main"
ADMIN_TOKEN = "admin-token-of-the-tests-0123456789"
SECRET_KEY = b"k" * 32
POLL_SECONDS = 2.5
MAX_BYTES = 1_000_000
MAX_PIXELS = 4_000_000

ENVIRONMENT = {
    "GATEWAY_SECRET_KEYS": base64.b64encode(SECRET_KEY).decode(),
    "GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN,
    "GATEWAY_MAX_IMAGE_BYTES": str(MAX_BYTES),
    "GATEWAY_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
    "GATEWAY_POLL_SECONDS": str(POLL_SECONDS),
}


@dataclass
class HeldResponses:
    """How many responses of the upstream are held, and whether they are released."""

    count: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)


class SandboxUpstreamControl:
    def __init__(self, control: SandboxControl) -> None:
        self.control = control
        self._behaviour = Behaviour()

    async def update_behaviour(self, **changes: Any) -> None:
        self._behaviour = replace(self._behaviour, **changes)
        await self.control.set_behaviour(self._behaviour)

    async def set_fault(self, **fault: Any) -> None:
        """Set a fault in place of those before, which would begin anew."""
        await self.update_behaviour(faults=(Fault(**fault),))

    async def count_submits(self) -> int:
        return sum(request.operation == "submit" for request in await self.control.list_requests())

    async def count_checks(self) -> int:
        return sum(request.operation == "check" for request in await self.control.list_requests())

    async def set_balance(self, count: int, money: int, user_key: str = USER_KEY) -> None:
        """Set the balance of an account: uses, and yuan."""
        await self.control.set_account(user_key, AccountBalance(count=count, money=money))

    async def refuse_next(self, outcome: SubmitOutcome, reason: str = "") -> None:
        """Refuse the next submit; `reason` is the vendor's for REJECTED."""
        words = {SubmitOutcome.EXHAUSTED: "账户剩余次数不足", SubmitOutcome.INVALID_ACCOUNT: "账户不存在"}
        refuse = words.get(outcome, f"任务提交失败:{reason}")
        await self.set_fault(on="submit", times=1, refuse=refuse)

    async def lose_next_response(self) -> None:
        """Accept the next submit and drop its response."""
        await self.set_fault(on="submit", times=1, reply="reset")

    async def keep_running(self) -> None:
        await self.update_behaviour(seconds=3_600)

    async def fail_next_task(self) -> None:
        await self.set_fault(on="submit", times=1, fail="it could not be done")

    async def wait_until_idle(self) -> None:
        """Wait until all tasks have ended, unless they run without end."""
        if not self._behaviour.seconds:
            await self.control.wait_until_idle()


@dataclass
class RunningGateway:
    """A gateway with one account `main` and one tenant `shop`, whose token is `token`."""

    url: str
    ops_url: str
    http: AsyncClient
    services: Container
    upstream: SandboxUpstreamControl
    advance_time: Callable[[float], Awaitable[None]]
    token: str = ""

    async def advance(self, seconds: float) -> None:
        """Advance the ledger's time and clear the task cache, whose entries would be outdated."""
        self.services.task_cache.clear()
        await self.advance_time(seconds)

    async def call(self, method: str, path: str, *, token: str | None = None, **more: Any) -> Response:
        """Call the tenants' port as `shop` or with another token; an empty one sends none."""
        token = self.token if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return await self.http.request(method, self.url + path, headers=headers | dict(more.pop("headers", {})), **more)

    async def call_admin(self, method: str, path: str, **more: Any) -> Response:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"} | dict(more.pop("headers", {}))
        return await self.http.request(method, f"{self.ops_url}/admin/v1{path}", headers=headers, **more)

    async def submit(
        self,
        kind: str = "face-enhance",
        fields: Mapping[str, str] | None = None,
        *,
        image: bytes | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        files = {"image": ("picture.png", make_png() if image is None else image, "image/png")}
        return await self.call(
            "POST", f"/v1/tasks/{kind}", token=token, files=files, data=dict(fields or {}), headers=headers or {}
        )

    async def put_tenant(self, name: str = "shop", **policy: Any) -> None:
        response = await self.call_admin("PUT", f"/tenants/{name}", json={"accounts": ["main"]} | policy)
        response.raise_for_status()

    async def new_token(self, tenant: str = "shop", **body: Any) -> str:
        response = await self.call_admin("POST", f"/tenants/{tenant}/tokens", json=body)
        return str(response.raise_for_status().json()["token"])

    async def poll_due_tasks(self) -> None:
        """Advance one poll interval and run all checks that are due."""
        await self.upstream.wait_until_idle()
        await self.advance(POLL_SECONDS)
        while await self.services.task_poller.start_due():
            pass
        await self.services.task_poller.wait_idle()

    async def deliver_due_webhooks(self) -> None:
        while await self.services.webhook_dispatcher.start_due():
            await self.services.webhook_dispatcher.wait_idle()

    async def wait_for_task(self, task_id: str, *, token: str | None = None) -> dict[str, Any]:
        """Poll until a task has ended."""
        for _ in range(10):
            response = await self.call("GET", f"/v1/tasks/{task_id}", token=token)
            task: dict[str, Any] = response.json()
            if task["state"] in {"succeeded", "failed"}:
                return task
            await self.poll_due_tasks()
        raise AssertionError("it is still running")

    @contextmanager
    def hold_responses(self) -> Iterator[HeldResponses]:
        """Hold the upstream's responses to submits until the end of the block."""
        upstream: Any = self.services.submitter.upstream
        held, submit = HeldResponses(), upstream.submit

        async def submit_and_hold(*args: Any, **more: Any) -> SubmitResult:
            result: SubmitResult = await submit(*args, **more)
            held.count += 1
            await held.released.wait()
            return result

        upstream.submit = submit_and_hold
        try:
            yield held
        finally:
            del upstream.submit
            held.released.set()

    async def create_demo_tenant(self) -> None:
        (await self.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})).raise_for_status()
        await self.put_tenant()
        self.token = await self.new_token()


_PERMANENT_KEYS = re.compile(
    r"\{[\w-]+\}:(version|clock(:offset|:server)?|registry|leases|poll:(due|claimed)|(tenant|account):\d+)"
)
"""Keys without a time to live, of any gateway: their number is bounded, and deleting the owner deletes them."""


async def assert_keys_expire(client: Any) -> None:
    """Fail if a key has no time to live and is not among the permanent ones."""
    async for key in client.scan_iter():
        name = key.decode()
        assert await client.pttl(key) > 0 or _PERMANENT_KEYS.fullmatch(name), f"{name} would stay for ever"


@contextmanager
def reject_store_calls(valkey: Valkey) -> Iterator[None]:
    """Make the store reject every access to a key within the block, as if it were away."""
    with Redis(unix_socket_path=str(valkey.socket_path)) as client:
        client.execute_command("ACL", "SETUSER", "default", "resetkeys")
        try:
            yield
        finally:
            client.execute_command("ACL", "SETUSER", "default", "allkeys")


@asynccontextmanager
async def run_real_gateway(
    valkey: Valkey, redactor: Redactor | None = None, **more: str
) -> AsyncIterator[RunningGateway]:
    """Run a gateway over an emptied Valkey and the sandbox; `more` are settings."""
    install_server_time()
    config = SandboxConfig(accounts={USER_KEY: AccountBalance(count=10, money=300)}, seconds=0)
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(open_sandbox(config))
        places = {"GATEWAY_REDIS_URL": valkey.url, "GATEWAY_UPSTREAM_URL": sandbox.url}
        settings = Settings.load(ENVIRONMENT | places | more)
        connections = connect(valkey.url, timeout=5)
        stack.push_async_callback(connections.aclose)
        client: Any = connections.commands
        await client.flushall()
        keys = Keys(settings.key_prefix)

        # Noon, since windows and reports would change at midnight; from the first advance on the clock stands still.
        now = await read_server_time(client, keys)
        await shift_server_time(client, keys, (DAY_MS // 2 - now % DAY_MS) // 1000)

        async def advance_time(seconds: float) -> None:
            await set_server_time(client, keys, await read_server_time(client, keys) + int(seconds * 1000))

        services = await stack.enter_async_context(open_container(settings, redactor=redactor))
        stack.push_async_callback(assert_keys_expire, client)
        app, ops_app = create_app(services), create_ops_app(services)
        url = await stack.enter_async_context(serve_app(app, refuse=app.refuse))
        ops_url = await stack.enter_async_context(serve_app(ops_app, refuse=ops_app.refuse))
        http = await stack.enter_async_context(AsyncClient(timeout=30, trust_env=False))
        upstream = SandboxUpstreamControl(sandbox.control)
        gateway = RunningGateway(url, ops_url, http, services, upstream, advance_time)
        await gateway.create_demo_tenant()
        yield gateway
