"""What a team would run instead of the gateway; each answers the gateway's requests as far as the benchmark sends them.

`POST /v1/tasks/{kind}` takes the image and forwards it to the vendor, `GET /v1/tasks/{id}` reads the task. The last two
check the bearer token, hold and settle a quota in Valkey, store the task there, and answer 201.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.peers.processes import Server


@contextmanager
def nginx_proxy(stub: Server, cpu: int) -> Iterator[Server]:
    """Run nginx that only passes on: the least that any server in front of the vendor costs."""
    raise NotImplementedError(stub, cpu)
    yield  # type: ignore[unreachable]


@contextmanager
def nginx_lua(stub: Server, redis_url: str, cpu: int) -> Iterator[Server]:
    """Run nginx with Lua that does the whole job: the practical limit. `redis_url` is `unix://PATH`."""
    raise NotImplementedError(stub, redis_url, cpu)
    yield  # type: ignore[unreachable]


@contextmanager
def fastapi_gateway(stub: Server, redis_url: str, cpu: int) -> Iterator[Server]:
    """Run a gateway of FastAPI and httpx as teams usually write it."""
    raise NotImplementedError(stub, redis_url, cpu)
    yield  # type: ignore[unreachable]
