"""HangWatch: tells a write that hangs from one that is slow."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

HANGS_AFTER_S = 1.0
"""A system call that has not returned for this long hangs: a dead network drive, a full pipe."""

SLOW_AFTER_S = 10.0
"""Where the kernel does not show system calls, a write hangs after this long."""

_FUTEX = {"x86_64": "202", "aarch64": "98"}.get(platform.machine(), "")
"""The system call in which a thread waits for another thread, such as an encoder's."""


class HangWatch:
    """Watches what a thread does. Ask regularly, on any one thread.

    A write that hangs waits in one and the same system call. An encoder, and a busy machine, take
    as long without hanging.

    Args:
        thread: the thread that writes.
        clock_s: a monotonic clock.
    """

    def __init__(self, thread: Thread, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._thread = thread
        self._clock_s = clock_s
        self._seen: object = None
        self._since_s = 0.0

    def hangs(self, call: object) -> bool:
        """Tell whether the thread hangs.

        Args:
            call: what it is at work on, an object of its own for each call; None for nothing.
        """
        system_call = _system_call(self._thread)
        seen = None if call is None or system_call == "" else (id(call), system_call)
        now_s = self._clock_s()
        if seen != self._seen:
            self._seen, self._since_s = seen, now_s
        after_s = SLOW_AFTER_S if system_call is None else HANGS_AFTER_S
        return seen is not None and now_s - self._since_s >= after_s


def _system_call(thread: Thread) -> str | None:
    """Return the system call that a thread waits in, with its arguments.

    "" if it waits in none, or for another thread; None if the kernel does not show it.
    """
    try:
        shown = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text()
    except OSError:
        return None
    number = shown.split()[0]
    return "" if number in ("running", "-1", _FUTEX) else shown
