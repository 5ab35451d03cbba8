"""Plugins and settings of all tests."""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = ["tests.support.no_skips", "tests.support.valkey"]

# It needs a Prometheus, and is run by name: `make test-monitoring`.
collect_ignore = ["monitoring"]

# The duration of an example depends on the machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
