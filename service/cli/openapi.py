"""`gateway openapi`: the documents of both ports, written from the code."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from service.api.openapi_document import build_document
from service.app import operators_app, tenants_app
from service.container import open_container
from service.settings import Settings

_OFFLINE_SETTINGS = {
    "GATEWAY_REDIS_URL": "redis://localhost",
    "GATEWAY_UPSTREAM_URL": "http://localhost",
    "GATEWAY_SECRET_KEYS": "A" * 43 + "=",
    "GATEWAY_ADMIN_TOKEN": "nobody-listens",
}


def write_openapi(folder: Path, *, check: bool) -> int:
    """Write the documents, or compare them with what is there. The exit code."""
    drifted = []
    for name, written in asyncio.run(_build_documents()).items():
        path, text = folder / name, yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=120)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        drifted.append(path)
        if not check:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            click.echo(f"wrote {path}")
    if check and drifted:
        names = ", ".join(str(path) for path in drifted)
        click.echo(f"gateway: {names} is not what the code says: run `make openapi` and commit it", err=True)
        return 1
    return 0


async def _build_documents() -> Mapping[str, Mapping[str, Any]]:
    async with open_container(Settings.load(_OFFLINE_SETTINGS)) as services:
        return {
            "gateway.yaml": build_document(tenants_app(services)),
            "operators.yaml": build_document(operators_app(services)),
        }
