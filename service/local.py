"""What a gateway without settings needs on its own machine: secrets, a Valkey server, a stand-in for the upstream.

It fills in whatever the settings leave open, and ends what it started. In production nothing is left open.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from service.child import stop, tied
from service.keyring import load_or_create_secrets
from service.settings import Settings
from service.storage.embedded import EmbeddedValkey

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
