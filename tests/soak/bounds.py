"""The command `gateway` with small caches: they are full after the warm-up, so that what still grows has no bound."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from importlib import import_module
from typing import Any

_BOUND = 300
_SIZES = (
    ("service.clients.artifacts", "MAX_CACHED_TYPES"),
    ("service.usecases.caches", "MAX_CACHED_TASKS"),
    ("service.usecases.task_status", "_MAX_QUERIES"),
    ("service.sandbox.store", "MAX_TASKS"),
    ("service.sandbox.faults", "_MAX_RECORDS"),
)
_lru_cache: Callable[..., Any] = functools.lru_cache


def _bounded_lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
    return _lru_cache(min(maxsize, _BOUND) if isinstance(maxsize, int) else maxsize, typed)


if __name__ == "__main__":
    functools.lru_cache = _bounded_lru_cache  # before any module is imported that uses it, also of libraries
    for module, name in _SIZES:
        imported = import_module(module)
        assert hasattr(imported, name)
        setattr(imported, name, _BOUND)
    runpy.run_module("service", run_name="__main__", alter_sys=True)
