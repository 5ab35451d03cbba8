"""What one tenant, or callers without a token, hold in a process leaves room for the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit

import pytest

from service import container
from tests.behaviour.clients import LegacyClient, wait_until
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.requests import expect_problem
from tests.support.images import make_png
from tests.support.valkey import Valkey
from tests.unit.asgi_client import open_raw_connection
from tests.unit.multipart_forms import CONTENT_TYPE, encode_file, encode_form

LARGEST = 26 << 20
"""Three of these are more than the memory for uploads."""
IMAGE = make_png() + b"\0" * (LARGEST - len(make_png()))
SHARE = "0.01"
WAITS, READS = 4, 5
PREFER = {"Prefer": "wait=60"}


async def submit_as_other(gateway: RunningGateway) -> tuple[str, str]:
    """Submit as another tenant; return its token and the path of the task."""
    await gateway.put_tenant("other")
    token = await gateway.new_token("other")
    return token, (await gateway.submit(token=token)).headers["location"]


@asynccontextmanager
async def hold_uploads(gateway: RunningGateway, path: str, part: str) -> AsyncIterator[None]:
    """Keep three uploads open of which only the end is missing, until one of them has come so far."""
    body = encode_form(encode_file(part, IMAGE), is_closed=False)
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {gateway.token}"]
    head += [f"Content-Type: {CONTENT_TYPE}", f"Content-Length: {len(body) + 100}", "", ""]
    async with AsyncExitStack() as stack:
        for _ in range(3):
            port = urlsplit(gateway.url).port or 0
            _, writer = await stack.enter_async_context(open_raw_connection(port))
            stack.callback(writer.transport.abort)
            writer.write("\r\n".join(head).encode() + body)
        pool = "unknown" if path.startswith("/api") else "tenants"
        async with asyncio.timeout(20):
            while await read_upload_bytes(gateway, pool) < LARGEST:
                pass
        yield


async def read_upload_bytes(gateway: RunningGateway, pool: str) -> float:
    lines = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text.splitlines()
    (line,) = [line for line in lines if line.startswith(f'gateway_upload_bytes{{pool="{pool}"}}')]
    return float(line.split()[1])


@pytest.mark.parametrize(
    ("path", "part"), [("/api/submit_vector_task", "input_image"), ("/v1/tasks/vectorize", "image")]
)
async def test_open_uploads(valkey: Valkey, path: str, part: str) -> None:
    """The file comes before the key on the old route, so that its callers are unknown."""
    async with run_real_gateway(valkey, GATEWAY_MAX_IMAGE_BYTES=str(LARGEST)) as gateway:
        token, _ = await submit_as_other(gateway)
        legacy = LegacyClient(gateway.http, gateway.url, token)
        async with hold_uploads(gateway, path, part):
            assert (await gateway.submit(image=IMAGE, token=token)).status_code == 201
            assert (await legacy.submit("submit_vector_task"))["err_code"] == 0


async def test_waits(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_WAITS", WAITS * 100)
    async with run_real_gateway(valkey, GATEWAY_TENANT_SHARE=SHARE) as gateway, asyncio.TaskGroup() as group:
        await gateway.upstream.keep_running()
        path, (token, others_path) = (await gateway.submit()).headers["location"], await submit_as_other(gateway)
        waits = [group.create_task(gateway.call("GET", path, headers=PREFER)) for _ in range(WAITS)]
        await wait_until(lambda: gateway.services.task_cache.subscription_count == WAITS)
        for refused in (path, f"{path}/events"):
            expect_problem(await gateway.call("GET", refused, headers=PREFER), 503, "overloaded")
        waits.append(group.create_task(gateway.call("GET", others_path, token=token, headers=PREFER)))
        await wait_until(lambda: gateway.services.task_cache.subscription_count > WAITS)
        for wait in waits:
            wait.cancel()


async def test_downloads(valkey: Valkey) -> None:
    async with run_real_gateway(valkey, GATEWAY_TENANT_SHARE=SHARE) as gateway, asyncio.TaskGroup() as group:
        token, others_path = await submit_as_other(gateway)
        path = (await gateway.submit()).headers["location"]
        for task, owner in ((path, gateway.token), (others_path, token)):
            await gateway.wait_for_task(task.rpartition("/")[2], token=owner)
        await gateway.upstream.set_fault(on="file", times=1, reply="hang")
        downloads = [group.create_task(gateway.call("GET", f"{path}/artifacts/image")) for _ in range(2)]
        (refused,), (download,) = await asyncio.wait(downloads, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        expect_problem(refused.result(), 503, "overloaded")
        assert int(refused.result().headers["retry-after"]) > 0
        assert (await gateway.call("GET", f"{others_path}/artifacts/image", token=token)).status_code == 200
        download.cancel()


async def test_reads(valkey: Valkey) -> None:
    async with run_real_gateway(valkey, GATEWAY_READS_PER_SECOND="1") as gateway:
        path = (await gateway.submit()).headers["location"]
        client = LegacyClient(gateway.http, gateway.url, gateway.token)
        assert {(await gateway.call("GET", path)).status_code for _ in range(READS)} == {200}
        async with asyncio.timeout(20):  # a token may send another read each second
            while (response := await gateway.call("GET", path)).status_code == 200:
                pass
            while (await client.check(path.rpartition("/")[2]))["err_code"] == 0:
                pass
        (violated,) = expect_problem(response, 429, "rate-limited")["violated_policies"]
        assert (violated["policy"], violated["limit"]) == ("second-reads", 1)
        assert response.headers["retry-after"] == "1"
        assert (await gateway.call("GET", path, token=await gateway.new_token())).status_code == 200
        assert (await gateway.submit()).status_code == 201
