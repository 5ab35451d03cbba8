from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = "import pytest\n@pytest.mark.{}\ndef test_it(): {}\n"


@pytest.mark.parametrize(
    "module",
    [
        MARK.format("skip", "pass"),
        MARK.format("xfail", "assert False"),
        "import pytest\ndef test_it(): pytest.skip('not today')\n",
        "import pytest\npytest.importorskip('nothing_of_this_name')\ndef test_it(): pass\n",
    ],
    ids=["mark", "expected", "within", "module"],
)
def test_skipped_test_fails_the_run(module: str, tmp_path: Path) -> None:
    (tmp_path / "test_excused.py").write_text(module)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.no_skips", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    assert run.returncode in {pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED}, run.stdout
    assert "skipped: " in run.stdout
