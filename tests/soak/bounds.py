"""The command `gateway` with small caches: they are full after the warm-up, so that what still grows has no bound."""

from __future__ import annotations

import runpy
from typing import Any, cast

from service.sandbox import faults, store
from service.usecases import caches, task_status

_BOUND = 300

if __name__ == "__main__":
    for module, name in (
        (caches, "MAX_CACHED_TASKS"),
        (task_status, "_MAX_QUERIES"),
        (store, "MAX_TASKS"),
        (faults, "_MAX_RECORDS"),
    ):
        assert hasattr(module, name)
        setattr(cast("Any", module), name, _BOUND)
    runpy.run_module("service", run_name="__main__", alter_sys=True)
