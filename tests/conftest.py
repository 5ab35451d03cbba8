"""What all tests share."""

from __future__ import annotations

pytest_plugins = ["tests.support.no_skips", "tests.support.valkey"]
