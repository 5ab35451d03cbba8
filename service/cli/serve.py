"""`gateway serve`: both ports, the watch, and in development all that they need."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from importlib import resources
from pathlib import Path

import click
import structlog
import uvicorn
import uvloop

from service import __version__
from service.api.edge import Edge
from service.app import create_app, create_ops_app
from service.domain.errors import Unavailable
from service.keyring import SecretFileError
from service.local import LocalError, completed
from service.services import Services
from service.settings import Environment, Role, Settings
from service.storage.address import parse_url
from service.storage.embedded import EmbeddedError
from service.telemetry import logs
from service.telemetry.redaction import Redactor
from service.usecases.bootstrap import demo_token
from service.wiring import assembled

_log = structlog.get_logger(__name__)

_TOKEN_FILE = "demo.token"  # noqa: S105 - the name of a file
_STORE_AWAY_SECONDS = 1.0
_KEEP_ALIVE_SECONDS = 75
"""Longer than clients and load balancers keep an idle connection: else they send a request into its close."""


class PortTakenError(Exception):
    """An address can't be listened on; the message is one line for whoever starts the gateway."""


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: two of them run in one process, which ends them together."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Signals:
    """What SIGINT and SIGTERM do: the first ends the gateway in good order, the next at once, as a kill would.

    In good order means that whatever was begun is finished; while the gateway still starts there is nothing to finish.
    Nothing can hold the second one up. What was under way then is settled when its lease runs out.
    """

    def __init__(self) -> None:
        self._starting = asyncio.current_task()
        self._told = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        if self._told.is_set():
            os._exit(1)
        self._told.set()
        if self._starting:
            self._starting.cancel()

    async def first(self) -> None:
        """The gateway has started: wait until it is told to end."""
        self._starting = None
        await self._told.wait()


def run(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. What can't be started is said in one line."""
    redactor = Redactor()
    logs.configure(json=settings.in_production, level=settings.log_level, stream=sys.stderr.buffer, redactor=redactor)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, redactor))
    except (LocalError, EmbeddedError, SecretFileError, PortTakenError) as error:
        click.echo(f"gateway: {error}", err=True)
        return 1
    except asyncio.CancelledError:
        return 0  # told to end while it started
    return 0


async def _serve(settings: Settings, redactor: Redactor) -> None:
    signals = _Signals()
    operators = _listen(settings.ops_host, settings.ops_port, "GATEWAY_OPS_")
    tenants = None if settings.role is Role.WORKER else _listen(settings.host, settings.port, "GATEWAY_")
    async with AsyncExitStack() as opened:
        full = await opened.enter_async_context(completed(settings))
        redactor.learn(*_secrets(full))
        services = await opened.enter_async_context(assembled(full, learn=redactor.learn, clean=redactor.text))
        await opened.enter_async_context(services.working())
        # The tenants' port is closed first, so that operators can look on while the last requests are answered.
        servers = [(_server(create_app(services), services.drain_seconds), tenants)] if tenants else []
        servers.append((_server(create_ops_app(services), services.drain_seconds), operators))
        async with asyncio.TaskGroup() as tasks:
            serving = [(server, tasks.create_task(server.serve(sockets=[at]))) for server, at in servers]
            _log.info(
                "gateway.started",
                version=__version__,
                role=settings.role,
                tenants=_url(tenants) if tenants else None,
                operators=_url(operators),
            )
            introducing = None
            if tenants and settings.env is Environment.DEVELOPMENT:
                introducing = tasks.create_task(_introduce(services, full, _url(tenants)))
            gc.collect()
            gc.freeze()  # what lives now lives on: later collections need not look at it
            await signals.first()
            _log.info("shutdown.begun")
            services.lifecycle.drain()
            if introducing:
                introducing.cancel()
            for server, served in serving:
                server.should_exit = True
                await served


def _secrets(settings: Settings) -> Iterator[str]:
    """All that the settings hold which nobody may read in the log."""
    yield from (each for each in (settings.admin_token, settings.upstream_user_key) if each)
    for key in settings.secret_keys:
        yield base64.b64encode(key).decode()
        yield base64.urlsafe_b64encode(key).decode()
    if settings.redis_url:
        address = parse_url(settings.redis_url)
        for each in (address.credentials, address.sentinel_credentials):
            yield each.password or ""


def _listen(host: str, port: int, prefix: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise PortTakenError(f"can't listen on {host}:{port} ({prefix}HOST, {prefix}PORT): {why}") from error


def _server(app: Edge, drain_seconds: int) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        http="httptools",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
    )
    return _Server(config)


async def _introduce(services: Services, settings: Settings, url: str) -> None:
    """Make the demo account and tenant, and print how to use them; where the store is away, once it is there."""
    hint = "No account was made: give GATEWAY_UPSTREAM_USER_KEY, or use `gateway account set`.\n\n"
    if settings.upstream_user_key:
        token = await _demo_token(services, settings.data_dir, settings.upstream_user_key)
        image = shlex.quote(f"image=@{resources.files('service.demo') / 'pictures' / 'photo.jpg'}")
        hint = f"""The demo tenant's token: {token}
Try it:

  curl -sS -H 'Authorization: Bearer {token}' -F {image} -F scale=2 {url}/v1/tasks/upscale

"""
    click.echo(f"\nThe gateway is ready: {url} (documentation: {url}/docs)\n{hint}Ctrl-C ends it.\n")


async def _demo_token(services: Services, folder: Path, user_key: str) -> str:
    """The demo tenant's token, kept in the data folder for the next start."""
    known = known_demo_token(folder)
    while True:
        try:
            token = await demo_token(services.operators, services.registry, user_key, known)
        except Unavailable as error:
            _log.warning("demo.delayed", detail=str(error))
            await asyncio.sleep(_STORE_AWAY_SECONDS)
        else:
            _keep_demo_token(folder, token)
            return token


def _keep_demo_token(folder: Path, token: str) -> None:
    path = folder / _TOKEN_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(token + "\n")
    except OSError as error:
        _log.warning("demo-token.lost", detail="It can't be kept: the next start makes another one.", error=str(error))


def known_demo_token(data_dir: Path) -> str | None:
    """The demo tenant's token, if a gateway has been started on this data folder."""
    with suppress(FileNotFoundError):
        return (data_dir / _TOKEN_FILE).read_text().strip() or None
    return None


def _url(listening: socket.socket) -> str:
    """The address under which this machine reaches what is listened on."""
    host, port = listening.getsockname()[:2]
    found = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{found}]:{port}" if ":" in found else f"http://{found}:{port}"
