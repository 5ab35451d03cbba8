"""Memory of the process that is free, but not yet returned to the system."""

from __future__ import annotations

import ctypes

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc (malloc_trim(3)); other libraries need none


def release_free_memory() -> None:
    """Return free memory to the system, which glibc does only at the end of its heap. Takes up to 10 ms."""
    if _malloc_trim:
        _malloc_trim(0)
