"""Memory: how much this process holds."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import NamedTuple

_STATM = Path("/proc/self/statm")


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
