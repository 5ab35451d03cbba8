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
from contextlib import AsyncExitStack, suppress
from importlib import resources
from pathlib import Path

import click
import structlog
import uvloop

from service import __version__
from service.app import create_app, create_ops_app
from service.container import Container, open_container
from service.crypto import SecretFileError
from service.devstack import DevServiceError, EmbeddedValkeyError, ensure_demo_token, start_dev_services
from service.domain.errors import Unavailable
from service.server import HttpServer, Limits, base_url, listen, raise_descriptor_limit
from service.settings import Environment, Role, Settings
from service.storage.connections import parse_redis_url
from service.storage.redis import DataVersionError
from service.telemetry import logging
from service.telemetry.redaction import Redactor

_log = structlog.get_logger(__name__)
_TOKEN_FILE = "demo.token"  # noqa: S105 - the name of a file
_STORE_RETRY_SECONDS = 1.0
_MAX_TENANT_CONNECTIONS = 10_000
_MAX_OPERATOR_CONNECTIONS = 500
_SHUTDOWN_MARGIN_SECONDS = 10
"""The process ends so long after two leases, whatever hangs: platforms are told to wait for 15 s more than those."""


class PortTakenError(Exception):
    """An address can't be listened on; the message is one line for whoever starts the gateway."""


class _SignalHandler:
    """What SIGINT and SIGTERM do: the first ends the gateway in good order, the next at once, as a kill would.

    In good order means that whatever was begun is finished; while the gateway still starts there is nothing to finish.
    Nothing can hold the second one up. What was under way then is settled when its lease runs out. So it is after
    `seconds`, should something hang until then, as Redis may.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline_seconds = seconds
        self._startup_task = asyncio.current_task()
        self._stop_requested = asyncio.Event()
        self._has_signal = False
        self._store_error: DataVersionError | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._has_signal:
            os._exit(1)
        self._has_signal = True
        self._request_stop()
        if self._startup_task:
            self._startup_task.cancel()

    def _request_stop(self) -> None:
        self._stop_requested.set()
        asyncio.get_running_loop().call_later(self._deadline_seconds, self._force_exit)

    def _force_exit(self) -> None:
        _log.error("shutdown.overdue", seconds=self._deadline_seconds)
        os._exit(1)

    def stop_with_error(self, error: DataVersionError) -> None:
        """End the gateway in good order, as a signal does, since it must not use its store."""
        self._store_error = error
        self._request_stop()

    def raise_store_error(self) -> None:
        """Raise the DataVersionError of `refuse`."""
        if self._store_error:
            raise self._store_error

    async def wait_for_stop(self) -> None:
        """The gateway has started: wait until it is told to end."""
        self._startup_task = None
        await self._stop_requested.wait()


def run(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. What can't be started is said in one line."""
    redactor = Redactor()
    logging.configure_logging(
        json=settings.is_production, level=settings.log_level, stream=sys.stderr.buffer, redactor=redactor
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, redactor))
    except (DevServiceError, EmbeddedValkeyError, SecretFileError, PortTakenError) as error:
        click.echo(f"gateway: {error}", err=True)
        return 1
    except DataVersionError as error:
        click.echo(f"gateway: {error.reason}", err=True)
        return 1
    except asyncio.CancelledError:
        return 0  # told to end while it started
    return 0


async def _serve(settings: Settings, redactor: Redactor) -> None:
    signals = _SignalHandler(2 * settings.lease_seconds + _SHUTDOWN_MARGIN_SECONDS)
    operators = _open_socket(settings.ops_host, settings.ops_port, "GATEWAY_OPS_")
    tenants = None if settings.role is Role.WORKER else _open_socket(settings.host, settings.port, "GATEWAY_")
    async with AsyncExitStack() as opened:
        full = await opened.enter_async_context(start_dev_services(settings))
        redactor.register_secrets(*_secret_values(full))
        services = await opened.enter_async_context(
            open_container(
                full,
                register_secret=redactor.register_secrets,
                redact=redactor.redact_text,
                on_version_error=signals.stop_with_error,
            )
        )
        with suppress(Unavailable, TimeoutError):  # a store that is away is checked when it first answers
            async with asyncio.timeout(_STORE_RETRY_SECONDS):
                await services.registry.refresh()
        signals.raise_store_error()
        await opened.enter_async_context(services.run_jobs())
        servers = _start_servers(services, tenants, operators)
        async with asyncio.TaskGroup() as tasks:
            _log.info(
                "gateway.started",
                version=__version__,
                role=settings.role,
                tenants=base_url(tenants) if tenants else None,
                operators=base_url(operators),
            )
            introducing = None
            if tenants and settings.env is Environment.DEVELOPMENT:
                introducing = tasks.create_task(_set_up_demo(services, full, base_url(tenants)))
            gc.collect()
            gc.freeze()  # what lives now lives on: later collections need not look at it
            await signals.wait_for_stop()
            _log.info("shutdown.begun")
            services.lifecycle.start_draining()
            if introducing:
                introducing.cancel()
            for server in servers:
                await server.stop(services.drain_seconds)
    signals.raise_store_error()


def _start_servers(
    services: Container, tenants: socket.socket | None, operators: socket.socket
) -> tuple[HttpServer, ...]:
    """Start to serve, in the order to stop in: operators can watch while the last tenants' requests end.

    The rest of the descriptors is for Redis, the upstream, results and webhooks.
    """
    descriptors = raise_descriptor_limit()
    started = []
    if tenants:
        app = create_app(services)
        limits = Limits(connections=min(_MAX_TENANT_CONNECTIONS, descriptors // 2))
        started.append((HttpServer(app, limits=limits, build_refusal=app.refuse), tenants))
    ops_app = create_ops_app(services)
    limits = Limits(connections=min(_MAX_OPERATOR_CONNECTIONS, descriptors // 8))
    started.append((HttpServer(ops_app, limits=limits, build_refusal=ops_app.refuse), operators))
    for server, listening in started:
        server.start(listening)
    return tuple(server for server, _ in started)


def _secret_values(settings: Settings) -> Iterator[str]:
    """All that the settings hold which nobody may read in the log."""
    yield from (each for each in (settings.admin_token, settings.upstream_user_key) if each)
    for key in settings.secret_keys:
        yield base64.b64encode(key).decode()
        yield base64.urlsafe_b64encode(key).decode()
    if settings.redis_url:
        address = parse_redis_url(settings.redis_url)
        for each in (address.credentials, address.sentinel_credentials):
            yield each.password or ""


def _open_socket(host: str, port: int, prefix: str) -> socket.socket:
    try:
        return listen(host, port)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise PortTakenError(f"can't listen on {host}:{port} ({prefix}HOST, {prefix}PORT): {why}") from error


async def _set_up_demo(services: Container, settings: Settings, url: str) -> None:
    """Make the demo account and tenant, and print how to use them; where the store is away, once it is there."""
    hint = "No account was made: give GATEWAY_UPSTREAM_USER_KEY, or use `gateway account set`.\n\n"
    if settings.upstream_user_key:
        token = await _ensure_demo_token(services, settings.data_dir, settings.upstream_user_key)
        image = shlex.quote(f"image=@{resources.files('service.demo') / 'images' / 'photo.jpg'}")
        hint = f"""The demo tenant's token: {token}
Try it:

  curl -sS -H 'Authorization: Bearer {token}' -F {image} -F scale=2 {url}/v1/tasks/upscale

"""
    click.echo(f"\nThe gateway is ready: {url} (documentation: {url}/docs)\n{hint}Ctrl-C ends it.\n")


async def _ensure_demo_token(services: Container, folder: Path, user_key: str) -> str:
    """The demo tenant's token, kept in the data folder for the next start."""
    known = read_demo_token(folder)
    delayed = False
    while True:
        try:
            token = await ensure_demo_token(services.registry_admin, services.registry, user_key, known)
        except Unavailable as error:
            if not delayed:  # logged once, as it may last for hours
                _log.warning("demo.delayed", detail=str(error))
            delayed = True
            await asyncio.sleep(_STORE_RETRY_SECONDS)
        else:
            _save_demo_token(folder, token)
            return token


def _save_demo_token(folder: Path, token: str) -> None:
    path = folder / _TOKEN_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(token + "\n")
    except OSError as error:
        _log.warning(
            "demo_token.write_failed", detail="It can't be kept: the next start makes another one.", error=str(error)
        )


def read_demo_token(data_dir: Path) -> str | None:
    """The demo tenant's token, if a gateway has been started on this data folder."""
    with suppress(FileNotFoundError):
        return (data_dir / _TOKEN_FILE).read_text().strip() or None
    return None
