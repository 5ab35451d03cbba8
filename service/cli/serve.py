"""`gateway serve`: both ports, the background jobs, and in development the services that they need."""

from __future__ import annotations

import asyncio
import base64
import ctypes
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
from service.cli.common import CommandError, load_settings
from service.container import Container, open_container
from service.crypto import SecretFileError
from service.devstack import DevServiceError, ensure_demo_token, start_dev_services
from service.domain.errors import Unavailable
from service.http_protocol import Limits
from service.memory import release_free_memory
from service.server import HttpServer, base_url, listen, raise_descriptor_limit
from service.setting_types import Environment, Role
from service.settings import Settings
from service.storage.connections import parse_redis_url
from service.storage.redis import DataVersionError
from service.telemetry import logging
from service.telemetry.redaction import Redactor
from service.usecases.background import cancel_and_wait

_log = structlog.get_logger(__name__)
_TOKEN_FILE = "demo.token"  # noqa: S105 - the name of a file
_STORE_RETRY_SECONDS = 1.0
_MAX_TENANT_CONNECTIONS = 10_000
_MAX_OPERATOR_CONNECTIONS = 500
_PR_SET_DUMPABLE = 4
_SHUTDOWN_MARGIN_SECONDS = 10
"""The process exits two leases and this margin after a signal; platforms wait for two leases and 15 s."""


class _SignalHandler:
    """Handler of SIGINT and SIGTERM.

    The first signal starts a graceful shutdown, which finishes pending work; during startup it cancels the startup.
    The second signal, or the deadline, ends the process at once: the leases of pending submissions expire.
    """

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
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
        """Shut down gracefully, since the store has another data version."""
        self._store_error = error
        self._request_stop()

    def raise_store_error(self) -> None:
        if self._store_error:
            raise self._store_error

    async def wait_for_stop(self) -> None:
        self._startup_task = None  # a signal must not cancel it any more
        await self._stop_requested.wait()


@click.command()
def serve() -> None:
    """Run the gateway until SIGINT or SIGTERM."""
    settings, redactor = load_settings(), Redactor()
    if settings.is_production:
        # No core dump has the secrets, and no other process of the user can read them. RLIMIT_CORE does not hold if
        # core_pattern is a pipe (core(5)).
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    stream = open(sys.stderr.fileno(), "wb", closefd=False)  # noqa: SIM115 - buffered, also with PYTHONUNBUFFERED
    logging.configure_logging(json=settings.is_production, level=settings.log_level, stream=stream, redactor=redactor)
    try:
        # A signal during the startup cancels it.
        with suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, redactor))
    except (DevServiceError, SecretFileError) as error:
        raise CommandError(str(error)) from None
    except DataVersionError as error:
        raise CommandError(error.reason) from None


async def _serve(settings: Settings, redactor: Redactor) -> None:
    _freeze_objects()  # of the imports: the startup fills what they left, and collects in less time
    signals = _SignalHandler(2 * settings.lease_seconds + _SHUTDOWN_MARGIN_SECONDS)
    operators = _open_socket(settings.ops_host, settings.ops_port, "GATEWAY_OPS_")
    tenants = None if settings.role is Role.WORKER else _open_socket(settings.host, settings.port, "GATEWAY_")
    async with AsyncExitStack() as stack:
        settings = await stack.enter_async_context(start_dev_services(settings))
        redactor.register_secrets(*_secret_values(settings))
        container = await stack.enter_async_context(
            open_container(settings, redactor=redactor, on_version_error=signals.stop_with_error)
        )
        with suppress(Unavailable, TimeoutError):  # an unavailable store is checked when it first responds
            async with asyncio.timeout(_STORE_RETRY_SECONDS):
                await container.registry.refresh()
        signals.raise_store_error()
        await stack.enter_async_context(container.run_jobs())
        servers = _start_servers(container, tenants, operators)
        async with asyncio.TaskGroup() as tasks:
            _log.info(
                "gateway.started",
                version=__version__,
                role=settings.role,
                tenants=base_url(tenants) if tenants else None,
                operators=base_url(operators),
            )
            demo_setup = None
            if tenants and settings.env is Environment.DEVELOPMENT:
                demo_setup = tasks.create_task(_set_up_demo(container, settings, base_url(tenants)))
            _freeze_objects()
            release_free_memory()
            await signals.wait_for_stop()
            _log.info("shutdown.begun")
            container.start_draining()
            if demo_setup:
                demo_setup.cancel()
            for server in servers:
                await server.stop(container.drain_seconds)
            if demo_setup:
                await cancel_and_wait([demo_setup])
    signals.raise_store_error()


def _freeze_objects() -> None:
    """Let later collections skip all present objects, which live until the end."""
    gc.collect()
    gc.freeze()


def _start_servers(
    container: Container, tenants: socket.socket | None, operators: socket.socket
) -> tuple[HttpServer, ...]:
    """Start the servers, and return them in the order to stop: the operators' port serves until the last.

    The limits leave descriptors for Redis, the upstream, results and webhooks.
    """
    descriptors = raise_descriptor_limit()
    started = []
    if tenants:
        app = create_app(container)
        limits = Limits(connections=min(_MAX_TENANT_CONNECTIONS, descriptors // 2))
        started.append((HttpServer(app, limits=limits, build_refusal=app.refuse), tenants))
    ops_app = create_ops_app(container)
    limits = Limits(connections=min(_MAX_OPERATOR_CONNECTIONS, descriptors // 8))
    started.append((HttpServer(ops_app, limits=limits, build_refusal=ops_app.refuse), operators))
    for server, sock in started:
        server.start(sock)
    return tuple(server for server, _ in started)


def _secret_values(settings: Settings) -> Iterator[str]:
    yield from filter(None, (settings.admin_token, settings.metrics_token, settings.upstream_user_key))
    for key in settings.secret_keys:
        yield base64.b64encode(key).decode()
        yield base64.urlsafe_b64encode(key).decode()
    if settings.redis_url:
        address = parse_redis_url(settings.redis_url)
        yield address.credentials.password or ""
        yield address.sentinel_credentials.password or ""


def _open_socket(host: str, port: int, prefix: str) -> socket.socket:
    try:
        return listen(host, port)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise CommandError(f"can't listen on {host}:{port} ({prefix}HOST, {prefix}PORT): {why}") from error


async def _set_up_demo(container: Container, settings: Settings, url: str) -> None:
    """Create the demo account and tenant, once the store is available, and print an example."""
    hint = "No account was created: set GATEWAY_UPSTREAM_USER_KEY, or use `gateway account create`.\n\n"
    if settings.upstream_user_key:
        token = await _ensure_demo_token(container, settings.data_dir, settings.upstream_user_key)
        image = shlex.quote(f"image=@{resources.files('service.demo') / 'images' / 'photo.jpg'}")
        browser = f"In a browser, with this token: {url}/playground\n" if container.has_playground else ""
        hint = f"""The demo tenant's token: {token}
{browser}Or in a shell:

  export GATEWAY_URL={url} GATEWAY_TOKEN={token}
  curl -sS -H "Authorization: Bearer $GATEWAY_TOKEN" -F {image} -F scale=2 "$GATEWAY_URL/v1/tasks/upscale"

"""
    click.echo(f"\nThe gateway is ready: {url} (guides and API: {url}/docs)\n{hint}Ctrl-C stops it.\n")


async def _ensure_demo_token(container: Container, folder: Path, user_key: str) -> str:
    stored_token = read_demo_token(folder)
    is_delayed = False
    while True:
        try:
            token = await ensure_demo_token(container.registry_admin, container.registry, user_key, stored_token)
        except Unavailable as error:
            if not is_delayed:  # logged once, as it may last for hours
                _log.warning("demo.delayed", detail=str(error))
            is_delayed = True
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
        _log.warning("demo_token.write_failed", detail="The next start creates another one.", error=str(error))


def read_demo_token(data_dir: Path) -> str | None:
    """Return the token that a gateway stored in its data folder, or None."""
    with suppress(FileNotFoundError):
        return (data_dir / _TOKEN_FILE).read_text().strip() or None
    return None
