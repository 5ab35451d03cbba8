"""Plugins and settings of all tests."""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = ["tests.support.no_skips", "tests.support.valkey"]

# It needs a Prometheus, and is run by name: `make test-monitoring`.
collect_ignore = ["monitoring"]

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
