"""The steps of the check, one line each."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import httpx2

from service import __version__
from service.crypto import generate_secret_key
from service.devstack import SANDBOX_USER_KEY
from tests.image.container import wait_until
from tests.image.host import run_command
from tests.image.report import expect, step
from tests.process.sandbox import run_sandbox
from tests.release.installation import Installation, install, is_reachable
from tests.release.wheel import expect_complete, expect_metadata
from tests.support.network import reserve_port
from tests.support.valkey import run_valkey

_ROOT = Path(__file__).parents[2]
_EXTRA = "imaging-gateway[local]"
_FAILING_COMMANDS: tuple[tuple[str, Mapping[str, str], int, tuple[str, ...]], ...] = (
    ("serve", {}, 1, (_EXTRA, "GATEWAY_REDIS_URL")),
    ("serve", {"GATEWAY_REDIS_URL": "unix:///nowhere"}, 1, (_EXTRA,)),
    ("serve", {"GATEWAY_ENV": "production"}, 2, ("GATEWAY_REDIS_URL", "GATEWAY_SECRET_KEYS", "GATEWAY_ADMIN_TOKEN")),
    ("check-config", {}, 1, (_EXTRA, "GATEWAY_REDIS_URL", "GATEWAY_UPSTREAM_URL")),
    ("sandbox", {}, 1, (_EXTRA,)),
    ("demo", {}, 1, ()),
)
"""Commands that fail without extras or settings: command, settings, exit code, and words in the output."""


@click.command("python -m tests.release")
@click.option("--uv", type=click.Path(exists=True, path_type=Path), required=True, help="The program uv.")
@click.option("--dist", type=click.Path(path_type=Path), default=_ROOT / "dist", help="Where the wheel is left.")
def main(uv: Path, dist: Path) -> None:
    """Build the wheel, inspect it, install it elsewhere, and serve with it."""
    with TemporaryDirectory(prefix="release-check-") as temporary:
        folder = Path(temporary)
        with step("release: wheel") as figures:
            built = run_command([str(uv), "--quiet", "build", "--wheel", "--out-dir", str(folder / "dist"), str(_ROOT)])
            (wheel,) = (folder / "dist").glob("*.whl")
            expect(not built, built)
            figures.append(f"{expect_complete(wheel, _ROOT)} files")
            expect_metadata(wheel, __version__, (_ROOT / "README.md").read_text("utf-8"))
        with step("release: installed, without extras"):
            installed = install(wheel, uv.absolute(), _ROOT, folder)
            output = installed.check_output("--version").strip()
            expect(output.endswith(f" {__version__}"), f"its version is {output!r}, not {__version__}")
            installed.check_output("openapi")
            for name in ("gateway.yaml", "operators.yaml"):
                same = (installed.folder / "openapi" / name).read_bytes() == (_ROOT / "openapi" / name).read_bytes()
                expect(same, f"the {name} that it writes is not the one in openapi/")
        with step("release: names missing extras and settings"):
            for words in _FAILING_COMMANDS:
                _expect_clear_error(installed, *words)
        with step("release: does the main job"):
            _run_main_job(installed)
        dist.mkdir(exist_ok=True)
        (dist / wheel.name).write_bytes(wheel.read_bytes())
    click.echo(f"{dist / wheel.name}")


def _expect_clear_error(
    installed: Installation, command: str, settings: Mapping[str, str], code: int, words: tuple[str, ...]
) -> None:
    result, output = installed.execute(command, **settings)
    plain = "Traceback" not in output and all(word in output for word in words)
    expect(result == code and plain, f"{output}`gateway {command}` ended with exit code {result} or without the names")


def _run_main_job(installed: Installation) -> None:
    """Serve with a real store and the checkout's sandbox, from the account to the result."""
    port, ops_port = reserve_port(), reserve_port()
    tenants, operators = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ops_port}"
    with run_valkey("--appendonly", "yes") as store, run_sandbox() as upstream:
        settings = {
            "GATEWAY_ENV": "production",
            "GATEWAY_PORT": str(port),
            "GATEWAY_OPS_PORT": str(ops_port),
            "GATEWAY_REDIS_URL": store.url,
            "GATEWAY_UPSTREAM_URL": upstream.url,
            "GATEWAY_SECRET_KEYS": generate_secret_key(),
            "GATEWAY_ADMIN_TOKEN": secrets.token_urlsafe(32),
            "GATEWAY_POLL_SECONDS": "0.1",
        }
        installed.check_output("check-config", "--connect", **settings)
        with installed.serve(f"{operators}/readyz", **settings):
            installed.check_output(
                "account", "create", "main", "--user-key-file", "-", stdin=SANDBOX_USER_KEY, **settings
            )
            installed.check_output("tenant", "create", "shop", "--account", "main", **settings)
            token = installed.check_output("token", "create", "shop", **settings).split()[-1]
            for path in ("/docs", "/openapi.json"):
                expect(is_reachable(tenants + path), f"{path} is not served")
            _submit(tenants, token)


def _submit(url: str, token: str) -> None:
    picture = (_ROOT / "service" / "demo" / "images" / "face.jpg").read_bytes()
    with httpx2.Client(
        base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=30
    ) as client:
        task = client.post("/v1/tasks/face-enhance", files={"image": picture}).raise_for_status().json()
        link = task["links"]["self"]
        wait_until(lambda: client.get(link).json()["state"] == "succeeded", "the end of the task")
        result = client.get(f"{link}/artifacts/image").raise_for_status()
        expect(result.content.startswith(b"\x89PNG"), "the result is no PNG")


if __name__ == "__main__":
    main()
