"""`gateway sandbox`."""

from __future__ import annotations

import asyncio
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import click

from service.cli.common import ExtraMissingError
from service.devstack import SANDBOX_USER_KEY

try:
    from service.sandbox.app import SandboxConfig, serve
    from service.sandbox.store import AccountBalance
except ModuleNotFoundError as error:
    raise ExtraMissingError("the sandbox", error) from error

_REQUIRED_PACKAGES = ("PIL", "cv2", "numpy", "vtracer")
"""What works on images. The sandbox loads it for the first task: without it, each would fail, one by one."""
_INITIAL_BALANCE = AccountBalance(count=100, money=100)


def missing_packages_error() -> str | None:
    """What is not installed that the sandbox needs, and how it is had."""
    missing = [name for name in _REQUIRED_PACKAGES if find_spec(name) is None]
    return f"the sandbox needs {', '.join(missing)}: install imaging-gateway[local]" if missing else None


def run_sandbox(folder: Path | None, host: str, port: int) -> int:
    """Serve until told to end; the address is printed once it listens. The exit code."""
    if lack := missing_packages_error():
        click.echo(f"gateway: {lack}", err=True)
        return 1
    config = SandboxConfig(folder=folder, accounts={SANDBOX_USER_KEY: _INITIAL_BALANCE})
    try:
        asyncio.run(serve(config, host, port, on_ready=click.echo))
    except OSError as error:
        click.echo(f"gateway: can't run the sandbox on {host}:{port}: {error.strerror or error}", err=True)
        return 1
    except sqlite3.Error as error:
        click.echo(f"gateway: can't run the sandbox in {folder}: {error}", err=True)
        return 1
    return 0
