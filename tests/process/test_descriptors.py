"""A gateway that runs out of file descriptors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2

from service.clients.http import BREAKER_THRESHOLD
from tests.process.gateway import run_gateway
from tests.process.sandbox import run_sandbox
from tests.support.images import make_png
from tests.support.network import exhaust_descriptors
from tests.support.valkey import Valkey

CONCURRENT_REQUESTS = 8


def test_submissions(tmp_path: Path, valkey: Valkey) -> None:
    """A submission that fails for lack of a descriptor costs nothing, frees its key, and succeeds once there is one."""
    with run_sandbox() as upstream, run_gateway(tmp_path, **upstream.gateway_settings(valkey)) as gateway:
        headers = {"Authorization": f"Bearer {gateway.environ['GATEWAY_ADMIN_TOKEN']}"}
        policy = {"accounts": ["demo"], "limits": [{"window": "total", "tasks": 100}]}
        httpx2.put(f"{gateway.ops_url}/admin/v1/tenants/demo", json=policy, headers=headers).raise_for_status()
        with (
            ThreadPoolExecutor(CONCURRENT_REQUESTS) as threads,
            httpx2.Client(base_url=gateway.url, timeout=30) as client,
        ):
            client.headers = {"Authorization": f"Bearer {gateway.token}"}

            def submit() -> httpx2.Response:
                key = {"Idempotency-Key": '"the-same"'}
                return client.post("/v1/tasks/face-enhance", files={"image": ("image.png", make_png())}, headers=key)

            assert gateway.run_curl_example().status_code == 201  # so that the scripts are loaded
            list(
                threads.map(lambda _: gateway.call("GET", "/v1/quota"), range(CONCURRENT_REQUESTS))
            )  # connections to the store
            client.get("/v1/quota").raise_for_status()
            with exhaust_descriptors(gateway.process.pid):
                refused = [submit() for _ in range(BREAKER_THRESHOLD + 1)]
            assert {(item.status_code, item.json()["code"]) for item in refused} == {(503, "upstream-unavailable")}
            assert all("retry-after" in item.headers for item in refused)
            (tasks,) = client.get("/v1/quota").json()["policies"]
            assert (tasks["used"], tasks["reserved"]) == (1, 0)
            accepted = submit()
            assert (accepted.status_code, "idempotent-replayed" in accepted.headers) == (201, False)
            assert upstream.count_requests("submit") == 2
