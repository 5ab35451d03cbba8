"""A program written for the vendor's API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from httpx2 import AsyncClient, Timeout

from tests.support.images import make_png

SUBMIT_FIELDS: dict[str, dict[str, Any]] = {
    "submit_task": {
        "sdxl_model_dropdown": "通用模型",
        "style_dropdown": "通用风格",
        "prompt": "",
        "neg_prompt": "",
        "upscale": 1.0,
        "s_noise": 1.003,
        "steps": 30,
        "high_fidelity": False,
        "strong_inpaint": False,
        "strong_inpaint_intensity": 0.5,
        "vector_switch": True,
        "color_count": 5,
    },
    "submit_vector_task": {"color_count": 5},
    "submit_face_enhance_task": {},
    "submit_seamless_task": {"fit": 0.3},
}
"""The fields of the four submit calls."""

FINAL_STATUSES = {"Completed", "Failed", None}


@dataclass(frozen=True)
class LegacyClient:
    """A client of the vendor's API; every response must be 200 with a JSON object."""

    http: AsyncClient
    base: str
    key: str

    async def submit(self, call: str, fields: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """Submit an image with the documented fields, or with `fields` instead."""
        data = {"user_key": self.key} | dict(SUBMIT_FIELDS[call] if fields is None else fields)
        request: dict[str, Any] = {"data": data, "files": {"input_image": ("picture.png", make_png())}} | more
        return await self.post(call, timeout=Timeout(connect=5, read=10, write=30, pool=None), **request)

    async def check(self, task_id: str) -> dict[str, Any]:
        return await self.post("check_task_status", data={"user_key": self.key, "task_id": task_id})

    async def wait_for_end(self, task_id: str, pause: Callable[[], Awaitable[None]]) -> dict[str, Any]:
        for _ in range(20):
            status = await self.check(task_id)
            assert status["err_code"] == 0, status
            if status["status"] in FINAL_STATUSES:
                return status
            await pause()
        raise AssertionError("it is still running")

    async def post(self, call: str, **request: Any) -> dict[str, Any]:
        response = await self.http.post(f"{self.base}/api/{call}", **request)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        content: dict[str, Any] = response.json()
        return content


def field_types(content: Mapping[str, Any]) -> dict[str, str]:
    return {name: type(value).__name__ for name, value in sorted(content.items())}
