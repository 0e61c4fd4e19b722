"""Memory: how much this process uses, and limits on what glibc keeps."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HEAPS = 2
"""Number of glibc heaps. Two are enough: inference and decoding allocate little concurrently."""

_STATM = Path("/proc/self/statm")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""From glibc's malloc.h."""

_Function = Callable[..., int]


class Memory(NamedTuple):
    """Resident memory of this process now and at its peak, bytes."""

    rss_bytes: int
    peak_bytes: int


def read_memory() -> Memory:
    """Read the resident memory. Where only the peak is known, both are the peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        rss_bytes = int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return Memory(peak_bytes, peak_bytes)
    return Memory(rss_bytes, max(peak_bytes, rss_bytes))


def limit_heaps() -> None:
    """Let all threads share ``HEAPS`` heaps of glibc; call this before threads are started.

    By default glibc has up to eight heaps per core. Memory that is free in one cannot be used by
    another. A camera that is reopened gets a new thread and with it another heap, until every heap
    has held a decoder once: with three Full HD cameras that was 130 MB more after sixty reconnects.
    ``MALLOC_ARENA_MAX`` takes precedence.
    """
    if _MALLOPT is not None and "MALLOC_ARENA_MAX" not in os.environ:
        _MALLOPT(_M_ARENA_MAX, HEAPS)


def keep_memory() -> None:
    """Let glibc keep freed memory: mapping large blocks again takes 1/6 of a training step."""
    if _MALLOPT is not None:
        _MALLOPT(_M_MMAP_MAX, 0)
        _MALLOPT(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Return unused pages to the operating system.

    By itself glibc returns only the free end of a heap, where hardly any memory of a decoder is.
    This takes a few milliseconds, and the pages must be mapped again when they are needed: call it
    after much was freed, not for every frame.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def _of_libc(name: str, *arguments: type[ctypes.c_int | ctypes.c_size_t]) -> _Function | None:
    """Return a function that only glibc has; None with other C libraries."""
    try:
        function = ctypes.CDLL(None)[name]
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function


_MALLOPT = _of_libc("mallopt", ctypes.c_int, ctypes.c_int)
_MALLOC_TRIM = _of_libc("malloc_trim", ctypes.c_size_t)
