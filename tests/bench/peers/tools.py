"""Required programs, and the versions of all participants."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
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
    *("fastapi", "granian", "hiredis", "httptools", "httpx", "httpx2", "litestar", "msgspec", "pydantic"),
    *("python-multipart", "redis", "starlette", "uvicorn", "uvloop"),
)


def require_tools() -> None:
    """Exit with the missing Debian packages unless all programs are there."""
    programs = [packages for program, packages in _PROGRAMS.items() if not find_program(program)]
    files = [package for pattern, package in _FILES.items() if not any(Path("/").glob(pattern))]
    if missing := " ".join(programs + files):
        command = f"apt-get install --no-install-recommends {missing}"
        raise SystemExit(f"error: the benchmark needs what Debian installs with: {command}")


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


def _version(program: str, option: str) -> str:
    """Return the first version number in a program's output, or an empty string."""
    path = find_program(program)
    if path is None:
        return ""
    # wrk exits with an error after its version.
    done = subprocess.run([path, option], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    match = re.search(r"\d+(\.\d+)+(-[\w.+~]+)?", done.stdout.decode(errors="replace"))
    return match[0] if match else ""
