"""A sandbox whose tasks take no time, and a client of the vendor's API that returns raw responses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
import pytest

from service.sandbox.app import RunningSandbox, SandboxConfig, open_sandbox
from service.sandbox.store import AccountBalance
from tests.support.images import make_png

ACCOUNTS = {"key": AccountBalance(3, 10), "other": AccountBalance(1, 0), "empty": AccountBalance(0, 0)}
UPSCALE: dict[str, Any] = {
    "sdxl_model_dropdown": "通用模型",
    "style_dropdown": "通用风格",
    "upscale": "2.0",
    "s_noise": "1.003",
    "steps": "30",
    "high_fidelity": "false",
    "strong_inpaint": "false",
}


class SandboxClient:
    def __init__(self, client: httpx2.AsyncClient) -> None:
        self.http = client

    async def submit(
        self,
        call: str = "submit_seamless_task",
        fields: Mapping[str, str] | None = None,
        *,
        image: bytes | None = None,
        user_key: str = "key",
    ) -> httpx2.Response:
        """Submit a task, by default the quickest."""
        content = make_png() if image is None else image
        data = {"user_key": user_key, **(UPSCALE if call == "submit_task" else {}), **(fields or {})}
        return await self.http.post(f"/api/{call}", data=data, files={"input_image": ("x.png", content)})

    async def submit_accepted(self, *arguments: Any, **more: Any) -> str:
        """Submit a task that must be accepted, and return its id."""
        answer = (await self.submit(*arguments, **more)).json()
        assert answer["err_code"] == 0, answer
        return str(answer["task_id"])

    async def check(self, task_id: str, user_key: str = "key") -> dict[str, Any]:
        response = await self.http.post("/api/check_task_status", data={"user_key": user_key, "task_id": task_id})
        answer: dict[str, Any] = response.json()
        return answer


@contextlib.asynccontextmanager
async def open_client(url: str) -> AsyncIterator[SandboxClient]:
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        yield SandboxClient(client)


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    async with open_sandbox(SandboxConfig(accounts=ACCOUNTS, seconds=0)) as sandbox:
        yield sandbox


@pytest.fixture
async def client(sandbox: RunningSandbox) -> AsyncIterator[SandboxClient]:
    async with open_client(sandbox.url) as client:
        yield client
