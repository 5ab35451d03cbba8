"""Check of a release: the wheel is built, inspected, and installed outside the checkout (`make release-check`).

The checked wheel and the list of its packages are left in dist/ for publication.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from dataclasses import replace
from email import message_from_string
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import click
from msgspec import json

from deploy.packages import write_sbom
from service import __version__
from service.crypto import generate_secret_key
from tests.image.report import Program, run_command, run_main_job, step
from tests.process.gateway import TIMEOUT_SECONDS
from tests.process.sandbox import run_sandbox
from tests.support.network import reserve_port
from tests.support.valkey import run_valkey

_ROOT = Path(__file__).parents[2]
_EXTRA = "extra [local]"
_EXCLUDED = "The package `litestar` requires `polyfactory"
"""Fault of an installation from the lock file, since `exclude-dependencies` of pyproject.toml omits this package."""


@click.command("python -m tests.release")
@click.option("--uv", type=click.Path(exists=True, path_type=Path), required=True, help="The program uv.")
@click.option("--dist", type=click.Path(path_type=Path), default=_ROOT / "dist", help="Where the wheel is left.")
def main(uv: Path, dist: Path) -> None:
    """Build the wheel, inspect it, install it elsewhere, and serve with it."""
    with TemporaryDirectory(prefix="release-check-") as temporary:
        folder = Path(temporary)
        with step("release: wheel"):
            built = run_command([str(uv), "--quiet", "build", "--wheel", "--out-dir", str(folder / "dist"), str(_ROOT)])
            assert not built, built
            (wheel,) = (folder / "dist").glob("*.whl")
            _expect_complete(wheel)
        with step("release: installed, without extras"):
            installed = _install(wheel, uv.absolute(), folder)
            assert installed.check_output("--version").split()[-1] == __version__, "its version is another"
        with step("release: lists its packages"):
            sbom = write_sbom(uv, folder / "dist")
            _expect_listed(sbom, folder / "venv")
        with step("release: names missing extras and settings"):
            installed.expect_failure("serve", code=1, names=(_EXTRA, "GATEWAY_REDIS_URL"))
            installed.expect_failure("check-config", code=1, names=(_EXTRA, "GATEWAY_UPSTREAM_URL"))
            installed.expect_failure("sandbox", code=1, names=(_EXTRA,))
            installed.expect_failure("demo", code=1, names=())
        with step("release: does the main job"):
            _serve(installed)
        dist.mkdir(exist_ok=True)
        for file in (wheel, sbom):
            (dist / file.name).write_bytes(file.read_bytes())
            click.echo(dist / file.name)


def _expect_complete(wheel: Path) -> None:
    """Require exactly the files of the package, with its name and version."""
    with ZipFile(wheel) as opened:
        held = {PurePosixPath(name) for name in opened.namelist()}
        metadata = {path.name: path for path in held if path.parts[0].endswith(".dist-info")}
        result = message_from_string(opened.read(str(metadata["METADATA"])).decode())
    files = [path for path in (_ROOT / "service").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    different = (held - {*metadata.values()}) ^ {PurePosixPath(path.relative_to(_ROOT)) for path in files}
    assert not different, f"files that are missing or superfluous: {', '.join(map(str, sorted(different)))}"
    assert (result["Name"], result["Version"]) == ("imaging-gateway", __version__), "its name or version is another"


def _install(wheel: Path, uv: Path, folder: Path) -> Program:
    """Install a wheel without extras, with the packages of the lock file, as in production."""
    venv, locked, empty = folder / "venv", folder / "locked.txt", folder / "empty"
    command = [str(uv), "--quiet", "--project", str(_ROOT)]
    run_command([*command, "export", "--locked", "--no-dev", "--no-emit-project", "--output-file", str(locked)])
    run_command([*command, "venv", str(venv)])
    # The lock file has hashes for all packages but the new wheel.
    run_command([*command, "pip", "install", "--python", str(venv), "--no-deps", "--requirements", str(locked)])
    run_command([*command, "pip", "install", "--python", str(venv), "--no-deps", str(wheel)])
    checked = [*command, "pip", "check", "--python", str(venv)]
    faults = subprocess.run(checked, capture_output=True, text=True, check=False).stderr
    named = [line.startswith(_EXCLUDED) for line in faults.splitlines() if line.startswith("The package ")]
    assert named == [True], f"{faults}of these, one is expected"
    empty.mkdir()
    return Program([str(venv / "bin" / "gateway")], {"PATH": os.defpath, "HOME": str(empty)}, empty)


def _expect_listed(sbom: Path, venv: Path) -> None:
    """Require that the list has every package of an environment in its version, but the gateway itself."""
    (site,) = venv.glob("lib/python*/site-packages")
    installed = {(item.name.lower().replace("_", "-"), item.version) for item in distributions(path=[str(site)])}
    listed = {(item["name"], item["version"]) for item in json.decode(sbom.read_bytes())["components"]}
    assert installed - listed == {("imaging-gateway", __version__)}, f"not listed: {sorted(installed - listed)}"


def _serve(installed: Program) -> None:
    """Serve with a real store and the checkout's sandbox, from the account to the result."""
    port, ops_port, log = reserve_port(), reserve_port(), installed.folder / "log"
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
        program = replace(installed, environ={**installed.environ, **settings})
        program.check_output("check-config", "--connect")
        with program.start("serve", log=log, ops_url=f"http://127.0.0.1:{ops_port}") as process:
            url = f"http://127.0.0.1:{port}"
            token = run_main_job(program, url, installed.folder / "results")
            _fetch_results(
                replace(installed, environ={**installed.environ, "GATEWAY_URL": url, "GATEWAY_TOKEN": token})
            )
            process.terminate()
            assert process.wait(TIMEOUT_SECONDS) == 0, f"{log.read_text()}it ended with exit code {process.returncode}"


def _fetch_results(caller: Program) -> None:
    """Fetch the results of the main job with the commands of a caller."""
    tasks = [task["id"] for task in json.decode(caller.check_output("tasks", "--json"))]
    files = caller.check_output("download", *tasks).split()
    assert len(files) > len(tasks), f"{len(tasks)} tasks have the results {files}"
    caller.check_output("submit", "upscale", "--help")


if __name__ == "__main__":
    main()
