"""Mixed traffic at a constant rate: each action has its own, whatever the responses take."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx2

from service.domain.tasks import Kind
from tests.support.images import make_png

_TIMEOUT_SECONDS = 60.0
_KNOWN_TASKS = 200
"""So many of the newest tasks are read and downloaded."""
_OPTIONS: Mapping[Kind, Mapping[str, str]] = {
    Kind.UPSCALE: {"scale": "2"},
    Kind.VECTORIZE: {"colors": "4"},
    Kind.FACE_ENHANCE: {},
    Kind.SEAMLESS: {"fit": "0.4"},
}
_PNG = make_png(48, 32)
_Action: TypeAlias = Callable[[random.Random], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class KnownTask:
    id: str
    token: str


@dataclass
class Traffic:
    """Callers of some tenants, and an operator.

    `unexpected` counts responses by action and status that are no part of the traffic.
    """

    url: str
    ops_url: str
    admin_token: str
    tokens: list[str]
    limited_token: str
    """Of a tenant that has used all of its limit."""
    client: httpx2.AsyncClient
    seed: int = 1
    requests: int = 0
    tasks: int = 0
    unexpected: Counter[str] = field(default_factory=Counter)
    _known: deque[KnownTask] = field(default_factory=lambda: deque(maxlen=_KNOWN_TASKS))
    _latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    async def run(self, seconds: float) -> None:
        """Send requests for so long, then wait for the last responses."""
        rates: Mapping[_Action, float] = {
            self._submit: 5,
            self._submit_twice: 0.5,
            self._submit_and_wait: 1,
            self._submit_as_vendor: 0.5,
            self._read: 10,
            self._read_unchanged: 3,
            self._wait: 0.5,
            self._stream: 1,
            self._download: 2,
            self._list: 2,
            self._report: 1,
            self._refused: 2,
            self._leave: 0.5,
            self._operate: 0.5,
            self._scrape: 0.2,
        }
        async with asyncio.TaskGroup() as group:
            for action, per_second in rates.items():
                group.create_task(self._repeat(action, per_second, time.monotonic() + seconds))

    def take_latencies(self) -> Mapping[str, list[float]]:
        """Return the latencies in milliseconds by action since the last call."""
        taken, self._latencies = self._latencies, defaultdict(list)
        return taken

    async def _repeat(self, action: _Action, per_second: float, deadline: float) -> None:
        randomness = random.Random(f"{self.seed} {action.__name__}")
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < deadline:
                await asyncio.sleep(randomness.expovariate(per_second))
                group.create_task(action(randomness))

    async def _send(
        self,
        name: str,
        method: str,
        path: str,
        *expected: int,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> httpx2.Response | None:
        """Send a request; return its response, None unless the status is expected."""
        self.requests += 1
        fields = {"Authorization": f"Bearer {token}"} if token else {}
        url = path if path.startswith("http") else self.url + path
        started_at = time.monotonic()
        try:
            response = await self.client.request(method, url, headers=fields | dict(headers or {}), **more)
        except httpx2.TransportError as error:
            self.unexpected[f"{name} {type(error).__name__}"] += 1
            return None
        self._latencies[name].append((time.monotonic() - started_at) * 1000)
        if response.status_code not in expected:
            self.unexpected[f"{name} {response.status_code}"] += 1
            return None
        return response

    async def _submit_image(
        self, name: str, token: str, randomness: random.Random, headers: Mapping[str, str] | None = None
    ) -> httpx2.Response | None:
        kind = randomness.choice([*Kind])
        response = await self._send(
            name,
            "POST",
            f"/v1/tasks/{kind}",
            201,
            token=token,
            headers=headers,
            data={**_OPTIONS[kind], "metadata": json.dumps({"order": f"{randomness.getrandbits(64):016x}"})},
            files={"image": ("image.png", _PNG, "image/png")},
        )
        if response is not None and "idempotent-replayed" not in response.headers:
            self.tasks += 1
            self._known.append(KnownTask(response.json()["id"], token))
        return response

    async def _submit(self, randomness: random.Random) -> None:
        await self._submit_image("submit", randomness.choice(self.tokens), randomness)

    async def _submit_twice(self, randomness: random.Random) -> None:
        """Submit under a key, and repeat that."""
        token, headers = randomness.choice(self.tokens), {"Idempotency-Key": f'"{randomness.getrandbits(64):016x}"'}
        state = randomness.getstate()
        await self._submit_image("submit", token, randomness, headers)
        randomness.setstate(state)
        await self._submit_image("repeat", token, randomness, headers)

    async def _submit_and_wait(self, randomness: random.Random) -> None:
        await self._submit_image("wait", randomness.choice(self.tokens), randomness, {"Prefer": "wait=20"})

    async def _submit_as_vendor(self, randomness: random.Random) -> None:
        """Submit and check as programs do that were written against the vendor."""
        form = {"user_key": randomness.choice(self.tokens)}
        files = {"input_image": ("image.png", _PNG, "image/png")}
        response = await self._send("vendor", "POST", "/api/submit_face_enhance_task", 200, data=form, files=files)
        if response is not None and response.json()["err_code"] == 0:
            self.tasks += 1
            await self._send(
                "vendor", "POST", "/api/check_task_status", 200, data=form | {"task_id": response.json()["task_id"]}
            )

    async def _read(self, randomness: random.Random) -> None:
        if self._known:
            task = randomness.choice(self._known)
            await self._send("read", "GET", f"/v1/tasks/{task.id}", 200, token=task.token)

    async def _read_unchanged(self, randomness: random.Random) -> None:
        if self._known:
            task = randomness.choice(self._known)
            path = f"/v1/tasks/{task.id}"
            first = await self._send("read", "GET", path, 200, token=task.token)
            if first is not None:
                headers = {"If-None-Match": first.headers["etag"]}
                await self._send("read", "GET", path, 200, 304, token=task.token, headers=headers)

    async def _wait(self, _randomness: random.Random) -> None:
        if self._known:
            task = self._known[-1]
            await self._send(
                "wait", "GET", f"/v1/tasks/{task.id}", 200, token=task.token, headers={"Prefer": "wait=20"}
            )

    async def _stream(self, _randomness: random.Random) -> None:
        if not self._known:
            return
        task = self._known[-1]
        self.requests += 1
        headers = {"Authorization": f"Bearer {task.token}"}
        try:
            async with self.client.stream("GET", f"{self.url}/v1/tasks/{task.id}/events", headers=headers) as response:
                if not response.is_success:
                    self.unexpected[f"stream {response.status_code}"] += 1
                async for _ in response.aiter_bytes():
                    pass
        except httpx2.TransportError as error:
            self.unexpected[f"stream {type(error).__name__}"] += 1

    async def _download(self, randomness: random.Random) -> None:
        """Fetch a result of an older task, which has most likely ended."""
        if self._known:
            task = self._known[randomness.randrange(max(len(self._known) // 2, 1))]
            found = await self._send("read", "GET", f"/v1/tasks/{task.id}", 200, token=task.token)
            for artifact in found.json()["artifacts"] if found is not None else ():
                await self._send("download", "GET", artifact["href"], 200, token=task.token)

    async def _list(self, randomness: random.Random) -> None:
        token, state = randomness.choice(self.tokens), randomness.choice(["succeeded", "running", "failed"])
        query = randomness.choice(["limit=20", f"state={state}&limit=5", "kind=upscale"])
        page = await self._send("list", "GET", f"/v1/tasks?{query}", 200, token=token)
        if page is not None and (cursor := page.json()["next_cursor"]):
            await self._send("list", "GET", "/v1/tasks", 200, token=token, params={"cursor": cursor})

    async def _report(self, randomness: random.Random) -> None:
        token = randomness.choice(self.tokens)
        await self._send("report", "GET", "/v1/quota", 200, token=token)
        await self._send("report", "GET", "/v1/usage?interval=month&group_by=kind", 200, token=token)

    async def _refused(self, randomness: random.Random) -> None:
        """Send what is refused: without a charge, and mostly before the upstream is asked."""
        token, path = randomness.choice(self.tokens), "/v1/tasks/upscale"
        image = {"image": ("image.png", _PNG, "image/png")}
        refusals: list[tuple[int, dict[str, Any]]] = [
            (415, {"files": {"image": ("image.png", b"%PDF-1.7", "image/png")}}),
            (422, {"files": {"image": ("image.png", _PNG[:-20], "image/png")}}),
            (422, {"files": image, "data": {"scale": "99"}}),
            (422, {"files": image, "data": {"no-option": "1"}}),
            (429, {"files": image, "token": self.limited_token}),
            (400, {"content": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}),
        ]
        status, more = randomness.choice(refusals)
        await self._send("refused", "POST", path, status, **{"token": token} | more)
        await self._send("refused", "GET", f"/v1/tasks/task_{randomness.getrandbits(64):x}", 404, token=token)

    async def _leave(self, randomness: random.Random) -> None:
        """Disconnect within a submission, or while waiting."""
        with suppress(TimeoutError):
            async with asyncio.timeout(randomness.uniform(0.001, 0.05)):
                await self._submit_image("leave", randomness.choice(self.tokens), randomness, {"Prefer": "wait=20"})

    async def _operate(self, randomness: random.Random) -> None:
        path = randomness.choice(["/tenants", "/accounts", "/tasks?tenant=tenant-0&limit=20", "/usage"])
        await self._send("operate", "GET", f"{self.ops_url}/admin/v1{path}", 200, token=self.admin_token)

    async def _scrape(self, _randomness: random.Random) -> None:
        await self._send("scrape", "GET", f"{self.ops_url}/metrics", 200)
