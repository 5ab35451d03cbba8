"""Required programs, and the versions of all participants."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from service.devstack import find_server_binary

_PROGRAMS = {"wrk": "wrk", "nginx": "nginx", "cc": "gcc libc6-dev", "taskset": "util-linux"}
"""Debian packages by program."""
_FILES = {
    "usr/lib/nginx/modules/ngx_http_lua_module.so": "libnginx-mod-http-lua",
    "usr/lib/*/lua/5.1/cjson.so": "lua-cjson",
}
"""Debian packages by pattern of a file."""
_PYTHON_PACKAGES = (
    "fastapi",
    "granian",
    "hiredis",
    "httptools",
    "httpx",
    "httpx2",
    "litestar",
    "msgspec",
    "pydantic",
    "python-multipart",
    "redis",
    "starlette",
    "uvicorn",
    "uvloop",
)
_POLICY = Path("/usr/sbin/policy-rc.d")
_LOCK_SECONDS = 120


def require_tools() -> None:
    """Require all programs: as root on Debian install missing ones, otherwise exit naming them."""
    missing = _missing()
    if not missing:
        return
    install = f"apt-get install --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SystemExit(f"error: the benchmark needs what Debian installs with: {install}")
    try:
        _install(missing)
    except subprocess.CalledProcessError as error:
        output = error.stdout.decode(errors="replace").strip()
        raise SystemExit(f"error: {install} failed: {output.rpartition(chr(10))[2]}") from None
    if still := _missing():
        raise SystemExit(f"error: the benchmark cannot find the programs and modules of Debian's {' '.join(still)}")


def versions() -> dict[str, str]:
    """Return the version of each program, Python package and the kernel."""
    results = {
        "wrk": _version("wrk", "-v"),
        "nginx": _version("nginx", "-v"),
        "gcc": _version("cc", "-dumpfullversion"),
        "valkey": _version(str(find_server_binary()), "--version"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    for package in _PYTHON_PACKAGES:
        try:
            results[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return results


def find_program(name: str) -> str | None:
    """Return the path of a program, or None; nginx may be in a folder outside the PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))


def _missing() -> list[str]:
    programs = [packages for program, packages in _PROGRAMS.items() if not find_program(program)]
    files = [package for pattern, package in _FILES.items() if not any(Path("/").glob(pattern))]
    return " ".join(programs + files).split()


def _install(packages: list[str]) -> None:
    apt = ["apt-get", "--quiet=2", f"--option=DPkg::Lock::Timeout={_LOCK_SECONDS}"]
    with _services_stay_off():
        _run([*apt, "update"])
        _run([*apt, "install", "--yes", "--no-install-recommends", *packages])


@contextmanager
def _services_stay_off() -> Iterator[None]:
    """Keep packages from starting services, as nginx would."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, check=True, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _version(program: str, option: str) -> str:
    """Return the first version number in a program's output, or an empty string."""
    path = find_program(program)
    if path is None:
        return ""
    # wrk exits with an error after its version.
    done = subprocess.run([path, option], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    match = re.search(r"\d+(\.\d+)+(-[\w.+~]+)?", done.stdout.decode(errors="replace"))
    return match[0] if match else ""
