"""Commands for development: the sandbox, the demo and the OpenAPI documents."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from service.cli.common import CommandError, json_option, load_settings

# The sandbox loads its image libraries for the first task, so that a missing one would fail every task.
SANDBOX_PACKAGES = ("PIL", "vtracer")
_OFFLINE_SETTINGS = {
    "GATEWAY_REDIS_URL": "redis://localhost",
    "GATEWAY_UPSTREAM_URL": "http://localhost",
    "GATEWAY_SECRET_KEYS": "A" * 43 + "=",
    "GATEWAY_ADMIN_TOKEN": "unused-by-openapi",
}


def missing_packages_error(feature: str, packages: Sequence[str]) -> str | None:
    """Return an error that names the packages that are not installed, or None."""
    missing = [name for name in packages if find_spec(name) is None]
    return (
        f"{feature} needs {', '.join(missing)}: install the gateway's wheel with its extra [local]" if missing else None
    )


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for persistent tasks.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8082, show_default=True, help="0 takes a free one.")
def sandbox(folder: Path | None, host: str, port: int) -> None:
    """Run a stand-in for the upstream: the vendor's API with real image processing."""
    if missing := missing_packages_error("the sandbox", SANDBOX_PACKAGES):
        raise CommandError(missing)
    from service.devstack import SANDBOX_USER_KEY
    from service.sandbox.app import SandboxConfig, serve
    from service.sandbox.store import AccountBalance

    config = SandboxConfig(folder=folder, accounts={SANDBOX_USER_KEY: AccountBalance(count=100, money=100)})
    try:
        asyncio.run(serve(config, host, port, on_ready=click.echo))
    except OSError as error:
        # The text of asyncio repeats the address.
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise CommandError(f"can't run the sandbox on {host}:{port}: {why}") from None
    except sqlite3.Error as error:
        raise CommandError(f"can't run the sandbox in {folder}: {error}") from None


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo-results"), show_default=True)
@click.option("--url", help="Address of the tenants' port.  [default: from GATEWAY_HOST and GATEWAY_PORT]")
@click.option("--token", help="A tenant's token.  [default: the demo tenant's]")
@json_option
def demo(folder: Path, url: str | None, token: str | None, *, as_json: bool) -> None:
    """Submit an image of each kind to a running gateway, and check the results."""
    if missing := missing_packages_error("the demo", ("PIL",)):
        raise CommandError(missing)
    from service.cli.serve import read_demo_token
    from service.demo.run import DemoOptions, run_demo

    settings = load_settings()
    token = token or read_demo_token(settings.data_dir)
    if token is None:
        raise CommandError(f"no demo token is in {settings.data_dir}: start a gateway with `make run`, or give --token")
    options = DemoOptions(
        base_url=url or f"http://{settings.host}:{settings.port}",
        token=token,
        folder=folder,
        output=sys.stdout,
        as_json=as_json,
    )
    sys.exit(asyncio.run(run_demo(options)))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("openapi"), show_default=True)
@click.option("--check", is_flag=True, help="Write nothing; fail if a file differs from the code.")
@json_option
def openapi(folder: Path, *, check: bool, as_json: bool) -> None:
    """Write the OpenAPI documents of both ports."""
    import yaml

    outdated = []
    for name, document in asyncio.run(_build_documents()).items():
        path, text = folder / name, yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        outdated.append(str(path))
        if not check:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            if not as_json:
                click.echo(f"wrote {path}")
    if as_json:
        from service.cli.formatting import format_json

        click.echo(format_json({"outdated": outdated, "written": bool(outdated) and not check}))
    if check and outdated:
        raise CommandError(f"{', '.join(outdated)} differs from the code: run `make openapi` and commit it")


async def _build_documents() -> Mapping[str, Mapping[str, Any]]:
    from service.api.openapi_document import build_document
    from service.app import operators_app, tenants_app
    from service.container import open_container
    from service.settings import Settings

    async with open_container(Settings.load(_OFFLINE_SETTINGS)) as container:
        return {
            "gateway.yaml": build_document(tenants_app(container)),
            "operators.yaml": build_document(operators_app(container)),
        }
