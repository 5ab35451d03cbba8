"""Run Helm on the chart, without cluster and network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
CHART = FOLDER / "imaging-gateway"
EXAMPLES: Mapping[str, Path] = {path.stem: path for path in sorted((FOLDER / "examples").glob("*.yaml"))}
"""Example values for documentation and tests, by name."""
RELEASE, NAMESPACE = "photos", "images"

Resource = Mapping[str, Any]


class HelmError(Exception):
    """Helm failed; the message is its output."""


def render(values: Path, *settings: str, chart: Path = CHART) -> Sequence[Resource]:
    """Render a release with these values, overridden by `settings` such as `api.replicas=3`. Raises HelmError."""
    overrides = [f"--set-json={setting}" for setting in settings]
    text = helm("template", RELEASE, chart, f"--namespace={NAMESPACE}", f"--values={values}", *overrides)
    return [resource for resource in yaml.safe_load_all(text) if resource]


def helm(*arguments: str | Path) -> str:
    """Run Helm in an empty environment, without clusters or plug-ins; returns its output. Raises HelmError."""
    program = Path(sys.executable).with_name("helm")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env={}, check=False)
    if done.returncode:
        output = f"{done.stdout}{done.stderr}".splitlines()
        # Helm warns about the symbolic links in the chart, which are intended.
        raise HelmError("\n".join(line for line in output if "found symbolic link" not in line).strip())
    return done.stdout
