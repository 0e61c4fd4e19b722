"""Memory: how much this process holds, and that it does not hold more than it needs."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HEAPS = 2
"""Enough: what many threads do at once, inference and decoding, allocates little."""

_STATM = Path("/proc/self/statm")
_M_ARENA_MAX = -8
"""From glibc's malloc.h."""

_Function = Callable[..., int]


class Memory(NamedTuple):
    """Resident memory of this process now, and the most that it ever was, bytes."""

    rss_bytes: int
    peak_bytes: int


def read_memory() -> Memory:
    """Ask the operating system. Where it tells only the peak, that stands for both."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        rss_bytes = int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return Memory(peak_bytes, peak_bytes)
    return Memory(rss_bytes, max(peak_bytes, rss_bytes))


def limit_heaps() -> None:
    """Let all threads share ``HEAPS`` of glibc's heaps; call it before there are threads.

    glibc lets eight threads a core have heaps of their own. What one keeps no other can use, and a
    camera that is opened again gets a new thread and with it another heap, until each of them has
    held a decoder once: of three cameras in Full HD that was 130 MB more after sixty reconnects.
    ``MALLOC_ARENA_MAX``, where it is set, knows better.
    """
    if _MALLOPT is not None and "MALLOC_ARENA_MAX" not in os.environ:
        _MALLOPT(_M_ARENA_MAX, HEAPS)


def give_back_memory() -> None:
    """Give pages on which nothing is stored back to the operating system.

    By itself glibc gives back only what lies free at the end of a heap, and of a decoder hardly
    anything does. It takes a few milliseconds, and those pages are taken anew when they are needed:
    call it when much was freed, and not for every frame.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def _of_libc(name: str, *arguments: type[ctypes.c_int | ctypes.c_size_t]) -> _Function | None:
    """Return one of glibc's own functions; None with other C libraries, which do without."""
    try:
        function = ctypes.CDLL(None)[name]
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function


_MALLOPT = _of_libc("mallopt", ctypes.c_int, ctypes.c_int)
_MALLOC_TRIM = _of_libc("malloc_trim", ctypes.c_size_t)
