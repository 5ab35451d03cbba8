"""The packages of the lock file: a list for a release (`make sbom`), and their known vulnerabilities (`make audit`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from msgspec import DecodeError, json

from service import __version__

_ROOT = Path(__file__).parents[1]
_PIP_AUDIT = "pip-audit==2.10.1"
_VULNERABLE_PACKAGE = "jinja2==2.4.1"
"""CVE-2014-1402 and others: a service that does not report them reports nothing."""


def write_sbom(uv: Path, folder: Path) -> Path:
    """List the packages of the image, with versions and hashes, as CycloneDX 1.5; returns the file.

    Those of the base image are not included.
    """
    document: Any = json.decode(_export(uv, "--no-dev", "--extra", "otel", "--format", "cyclonedx1.5"))
    document["metadata"]["component"]["version"] = __version__  # which is in the code, not in the lock file
    file = folder / f"imaging_gateway-{__version__}.cdx.json"
    folder.mkdir(exist_ok=True)
    file.write_bytes(json.format(json.encode(document)))
    return file


def _export(uv: Path, *options: str) -> bytes:
    command = [str(uv.absolute()), "--quiet", "export", "--locked", "--no-emit-project", *options]
    return subprocess.run(command, stdout=subprocess.PIPE, cwd=_ROOT, check=True).stdout


_uv_option = click.option("--uv", type=click.Path(exists=True, path_type=Path), required=True, help="The program uv.")


@click.group("python -m deploy.packages")
def main() -> None:
    pass


@main.command()
@_uv_option
@click.option("--dist", type=click.Path(path_type=Path), default=_ROOT / "dist", help="Where the list is written.")
def sbom(uv: Path, dist: Path) -> None:
    """Write the list of packages."""
    click.echo(write_sbom(uv, dist))


@main.command()
@_uv_option
def audit(uv: Path) -> None:
    """Report known vulnerabilities of all packages; exits with 1 for some, with 2 if the service does not respond.

    pip-audit skips a package that the service does not know, and one without data has no vulnerabilities. Through a
    mirror that has packages only, it would therefore pass.
    """
    with TemporaryDirectory(prefix="audit-") as temporary:
        folder = Path(temporary)
        vulnerable, locked = folder / "vulnerable.txt", folder / "locked.txt"
        vulnerable.write_text(_VULNERABLE_PACKAGE)
        locked.write_bytes(_export(uv, "--all-extras"))
        options = ("--strict", "--no-deps", "--disable-pip", "--progress-spinner=off", f"--cache-dir={folder}")
        command = [str(uv), "tool", "run", "--quiet", "--from", _PIP_AUDIT, "pip-audit", *options]
        if not _reports_vulnerability([*command, "--format=json", f"--requirement={vulnerable}"]):
            click.echo("error: pypi.org has no data on vulnerabilities here: nothing was checked", err=True)
            sys.exit(2)
        sys.exit(subprocess.run([*command, f"--requirement={locked}"], check=False).returncode)


def _reports_vulnerability(command: Sequence[str]) -> bool:
    output = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout
    try:
        return any(item.get("vulns") for item in json.decode(output, type=dict[str, Any])["dependencies"])
    except (DecodeError, KeyError):
        return False


if __name__ == "__main__":
    main()
