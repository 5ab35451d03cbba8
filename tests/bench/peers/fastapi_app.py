"""A gateway with FastAPI and httpx as teams usually write it: idiomatic, neither tuned nor crippled.

`uvicorn tests.bench.peers.fastapi_app:app` runs it; VENDOR_URL, VENDOR_USER_KEY, REDIS_URL and TOKEN configure it.
"""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from redis.asyncio import Redis

VENDOR_URL = os.environ.get("VENDOR_URL", "http://127.0.0.1:9000")
VENDOR_USER_KEY = os.environ.get("VENDOR_USER_KEY", "")
REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
TOKEN = os.environ.get("TOKEN", "")

QUOTA = 1_000_000_000
TASK_SECONDS = 7 * 86_400
MAX_IMAGE_BYTES = 32 * 1024 * 1024
IMAGE_TYPES = {"image/png", "image/jpeg", "image/webp"}

HOLD = """
local used = tonumber(redis.call('HGET', KEYS[1], 'used') or '0')
local held = tonumber(redis.call('HGET', KEYS[1], 'held') or '0')
if used + held >= tonumber(ARGV[1]) then
    return 0
end
redis.call('HINCRBY', KEYS[1], 'held', 1)
return 1
"""
SETTLE = """
redis.call('HINCRBY', KEYS[1], 'held', -1)
redis.call('HINCRBY', KEYS[1], 'used', ARGV[1])
return 1
"""


class Kind(StrEnum):
    UPSCALE = "upscale"


class State(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Links(BaseModel):
    self: str


class Task(BaseModel):
    id: str
    kind: Kind
    state: State
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None = None
    options: dict[str, Any]
    upstream_id: str
    artifacts: list[str] = []
    error: str | None = None
    links: Links


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    redis = Redis.from_url(REDIS_URL, decode_responses=True)
    app.state.redis = redis
    app.state.hold = redis.register_script(HOLD)
    app.state.settle = redis.register_script(SETTLE)
    async with httpx.AsyncClient(base_url=VENDOR_URL, timeout=120) as client:
        app.state.vendor = client
        yield
    await redis.aclose()


app = FastAPI(title="Imaging gateway", lifespan=lifespan)
bearer = HTTPBearer()


async def get_tenant(credentials: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> str:
    if not secrets.compare_digest(credentials.credentials.encode(), TOKEN.encode()):
        raise HTTPException(401, "The token is not valid.")
    return "tenant"


Tenant = Annotated[str, Depends(get_tenant)]
Image = Annotated[UploadFile, File()]


@app.post("/v1/tasks/upscale", status_code=201)
async def upscale(
    request: Request,
    response: Response,
    tenant: Tenant,
    image: Image,
    scale: Annotated[float, Form(ge=1, le=8)] = 2,
    noise: Annotated[float, Form(ge=1, le=1.1)] = 1.003,
    steps: Annotated[int, Form(ge=20, le=40)] = 30,
    prompt: Annotated[str, Form()] = "",
    negative_prompt: Annotated[str, Form()] = "",
) -> Task:
    fields = {
        "sdxl_model_dropdown": "通用模型",
        "style_dropdown": "通用风格",
        "upscale": scale,
        "s_noise": noise,
        "steps": steps,
        "prompt": prompt,
        "neg_prompt": negative_prompt,
    }
    if image.content_type not in IMAGE_TYPES:
        raise HTTPException(415, "The image has to be PNG, JPEG or WebP.")
    content = await image.read()
    if len(content) > MAX_IMAGE_BYTES:
        raise HTTPException(413, "The image is too large.")
    state = request.app.state
    quota = f"quota:{tenant}"
    if not await state.hold(keys=[quota], args=[QUOTA]):
        raise HTTPException(429, "The quota is used up.")
    try:
        answer = await state.vendor.post(
            "/api/submit_task",
            data={"user_key": VENDOR_USER_KEY, **fields},
            files={"input_image": (image.filename, content, image.content_type)},
        )
        answer.raise_for_status()
        accepted = answer.json()
        if accepted["err_code"] != 0:
            raise HTTPException(502, accepted.get("err_msg", "The vendor refused."))
    except httpx.HTTPError as error:
        await state.settle(keys=[quota], args=[0])
        raise HTTPException(502, "The vendor did not answer.") from error
    except HTTPException:
        await state.settle(keys=[quota], args=[0])
        raise
    now = datetime.now(UTC)
    task_id = f"task_{uuid.uuid4().hex}"
    task = Task(
        id=task_id,
        kind=Kind.UPSCALE,
        state=State.RUNNING,
        created_at=now,
        updated_at=now,
        options=fields,
        upstream_id=accepted["task_id"],
        links=Links(self=f"/v1/tasks/{task_id}"),
    )
    await state.settle(keys=[quota], args=[1])
    await state.redis.set(f"task:{tenant}:{task_id}", task.model_dump_json(), ex=TASK_SECONDS)
    response.headers["Location"] = task.links.self
    return task


@app.get("/v1/tasks/{task_id}")
async def read_task(request: Request, tenant: Tenant, task_id: str) -> Task:
    stored = await request.app.state.redis.get(f"task:{tenant}:{task_id}")
    if stored is None:
        raise HTTPException(404, "There is no such task.")
    return Task.model_validate_json(stored)
