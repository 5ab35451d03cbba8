"""What a team would run instead of the gateway; each implements the requests that the benchmark sends.

`POST /v1/tasks/{kind}` forwards the image to the vendor, `GET /v1/tasks/{id}` reads the task. The last two check the
bearer token, hold and settle a quota in Valkey, store the task there, and respond with 201. The proxy only forwards:
a read is a check at the vendor, and responses are the vendor's.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench.peers.processes import Server, serving
from tests.bench.peers.stub import USER_KEY
from tests.bench.peers.tools import find_program
from tests.support.network import reserve_port

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]


@contextmanager
def nginx_proxy(stub: Server, cpu: int) -> Iterator[Server]:
    """Run nginx as a plain proxy: the minimal cost of any server in front of the vendor."""
    with _nginx("nginx", "nginx_proxy.conf", {"VENDOR": urlsplit(stub.url).netloc}, cpu, token="") as server:
        yield server


@contextmanager
def nginx_lua(stub: Server, redis_url: str, cpu: int) -> Iterator[Server]:
    """Run nginx with Lua that does the whole job: the practical limit.

    `redis_url` is `unix://PATH` or `redis://HOST:PORT`, HOST an address.
    """
    redis = urlsplit(redis_url)
    token = secrets.token_hex(16)
    values = {
        "CODE": str(_HERE),
        "REDIS": f'"unix:{redis.path}"' if redis.scheme == "unix" else f'"{redis.hostname}", {redis.port or 6379}',
        "VENDOR": urlsplit(stub.url).netloc,
        "TOKEN": token,
    }
    with _nginx("nginx + Lua", "nginx_lua.conf", values, cpu, token=token) as server:
        yield server


@contextmanager
def fastapi_gateway(stub: Server, redis_url: str, cpu: int) -> Iterator[Server]:
    """Run a gateway of FastAPI and httpx, in one uvicorn with its defaults."""
    port = reserve_port()
    token = secrets.token_hex(16)
    app = "tests.bench.peers.fastapi_app:app"
    environ = os.environ | {
        "VENDOR_URL": stub.url,
        "VENDOR_USER_KEY": USER_KEY,
        "REDIS_URL": redis_url,
        "TOKEN": token,
    }
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(_ROOT), "--port", str(port), app]
    url = f"http://127.0.0.1:{port}"
    with serving("FastAPI + httpx", command, cpu=cpu, url=url, token=token, environ=environ) as server:
        yield server


@contextmanager
def _nginx(name: str, template: str, values: Mapping[str, str], cpu: int, *, token: str) -> Iterator[Server]:
    """Run nginx as the current user, with all its files in a temporary folder."""
    port = reserve_port()
    # nginx drops the privileges of root unless `user` keeps them.
    user = "user root;" if os.geteuid() == 0 else ""
    config = (_HERE / template).read_text()
    for key, value in {"PORT": str(port), "USER": user, "USER_KEY": USER_KEY, **values}.items():
        config = config.replace(f"@{key}@", value)
    program = find_program("nginx") or "nginx"
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        path = Path(folder) / "nginx.conf"
        path.write_text(config)
        command = [program, "-p", folder, "-c", str(path), "-e", "stderr"]
        with serving(name, command, cpu=cpu, url=f"http://127.0.0.1:{port}", token=token) as server:
            yield server
