"""Plugins and settings of all tests."""

from __future__ import annotations

import signal
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["tests.support.valkey"]

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)

# The duration of an example depends on the machine.
settings.register_profile("short", deadline=None, max_examples=20, stateful_step_count=20)
settings.register_profile("long", deadline=None, max_examples=100, stateful_step_count=40)
settings.load_profile("short")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; processes of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

_SLOW_FOLDERS = {"chaos", "clients", "deploy", "monitoring", "pages", "process"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole folders: what `make test` leaves to `make test-all`, and what `make test-fast` runs."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in _SLOW_FOLDERS:
            item.add_marker("slow")
        elif folder == "unit":
            item.add_marker("smoke")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _fail_skipped(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _fail_skipped(report)


def _fail_skipped(report: _Report) -> _Report:
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped: {report.longrepr}"
        # Without its reason, an expected failure is shown as the failure that it is.
        vars(report).pop("wasxfail", None)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Run tests with a slow fixture in common on one worker.

    The marker `xdist_group` is for that, but pytest-xdist 3.8 does not find it with pytest 9.2.
    """
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = _find_scope
    return scheduler


def _find_scope(node_id: str) -> str:
    file = node_id.partition("::")[0]
    folder = file.split("/")[1]
    if folder in {"clients", "monitoring"}:
        return folder
    return file if folder in {"chaos", "pages", "process"} else node_id
