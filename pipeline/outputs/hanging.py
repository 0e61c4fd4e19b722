"""HangWatch: distinguishes a write that hangs from one that is slow."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

HANGS_AFTER_S = 1.0
"""A system call that has not returned for this long hangs: a dead network drive, a full pipe."""

SLOW_AFTER_S = 10.0
"""The same limit if the kernel does not show system calls."""

_FUTEX = {"x86_64": "202", "aarch64": "98"}.get(platform.machine(), "")
"""The system call in which a thread waits for another thread, such as an encoder's."""


class HangWatch:
    """Watches a thread that writes. Call ``hangs`` regularly, always on the same thread.

    A write that hangs stays in one system call. An encoder or a busy machine may take as long, but
    not in one system call.

    Args:
        thread: the thread that writes.
        clock_s: returns monotonic seconds.
    """

    def __init__(self, thread: Thread, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._thread = thread
        self._clock_s = clock_s
        self._waiting_in: object = None
        self._since_s = 0.0

    def hangs(self, call: object) -> bool:
        """Tell whether the thread hangs.

        Args:
            call: identifies the thread's current write, a new object for each; None if it is idle.
        """
        system_call = _system_call(self._thread)
        waiting_in = None if call is None or system_call == "" else (id(call), system_call)
        now_s = self._clock_s()
        if waiting_in != self._waiting_in:
            self._waiting_in, self._since_s = waiting_in, now_s
        after_s = SLOW_AFTER_S if system_call is None else HANGS_AFTER_S
        return waiting_in is not None and now_s - self._since_s >= after_s


def _system_call(thread: Thread) -> str | None:
    """Return the system call that a thread waits in, with its arguments.

    Return "" if it waits in none or for another thread; None if the kernel does not show it.
    """
    try:
        shown = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text()
    except OSError:
        return None
    number = shown.split()[0]
    return "" if number in ("running", "-1", _FUTEX) else shown
