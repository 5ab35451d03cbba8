"""`gateway serve`: both ports, the watch, and in development all that they need."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

import click
import uvicorn
import uvloop

from service.api.edge import Edge
from service.app import create_app, create_ops_app
from service.keyring import SecretFileError
from service.local import LocalError, completed
from service.settings import Environment, Role, Settings
from service.storage.embedded import EmbeddedError
from service.telemetry import logs
from service.telemetry.redaction import Redactor
from service.usecases.bootstrap import demo_token
from service.wiring import DRAIN_SECONDS, Services, assembled

_TOKEN_FILE = "demo.token"  # noqa: S105 - the name of a file


class PortTakenError(Exception):
    """An address can't be listened on; the message is one line for whoever starts the gateway."""


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: two of them run in one process, which ends them together."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
    return 0


async def _serve(settings: Settings, redactor: Redactor) -> None:
    operators = _listen(settings.ops_host, settings.ops_port, "GATEWAY_OPS_PORT")
    tenants = None if settings.role is Role.WORKER else _listen(settings.host, settings.port, "GATEWAY_PORT")
    async with completed(settings) as full, assembled(full) as services, services.working():
        redactor.learn(*(each for each in (full.admin_token, full.upstream_user_key) if each))
        servers = {operators: _server(create_ops_app(services))}
        if tenants:
            servers[tenants] = _server(create_app(services))
        end = _ending(services, list(servers.values()))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, end)
        async with asyncio.TaskGroup() as serving:
            for listening, server in servers.items():
                serving.create_task(server.serve(sockets=[listening]))
            if tenants and settings.env is Environment.DEVELOPMENT:
                await _introduce(services, full, tenants)
            gc.collect()
            gc.freeze()  # what lives now lives on: later collections need not look at it


def _listen(host: str, port: int, name: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise PortTakenError(f"can't listen on {host}:{port}, set {name}: {error.strerror or error}") from error


def _server(app: Edge) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        http="httptools",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(DRAIN_SECONDS),
    )
    return _Server(config)


def _ending(services: Services, servers: Sequence[uvicorn.Server]) -> Callable[[], None]:
    """What a signal does: the first ends the servers once their requests are answered, the next at once."""

    def end() -> None:
        services.lifecycle.drain()
        for server in servers:
            server.force_exit = server.should_exit
            server.should_exit = True

    return end


async def _introduce(services: Services, settings: Settings, listening: socket.socket) -> None:
    """Make the demo account and tenant, and print how to use them."""
    path = settings.data_dir / _TOKEN_FILE
    key = settings.upstream_user_key
    if key is None:
        return
    token = await demo_token(services.operators, services.registry, key, known_demo_token(settings.data_dir))
    path.touch(mode=0o600)
    path.write_text(token + "\n")
    host, port = listening.getsockname()[:2]
    url = f"http://{_reachable(host)}:{port}"
    click.echo(
        f"""
The gateway is ready: {url} (documentation: {url}/docs)
The demo tenant's token: {token}
Try it:

  curl -sS -H 'Authorization: Bearer {token}' -F image=@{_picture()} -F scale=2 {url}/v1/tasks/upscale

Ctrl-C ends it.
"""
    )


def _picture() -> str:
    """The path of a picture to try, as short as can be from here."""
    return os.path.relpath(str(resources.files("service.demo") / "pictures" / "photo.jpg"))


def known_demo_token(data_dir: Path) -> str | None:
    """The demo tenant's token, if a gateway has been started on this data folder."""
    with suppress(FileNotFoundError):
        return (data_dir / _TOKEN_FILE).read_text().strip() or None
    return None


def _reachable(host: str) -> str:
    """The address under which this machine reaches a host that was listened on."""
    found = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{found}]" if ":" in found else found
