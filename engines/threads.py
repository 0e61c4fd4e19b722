"""Threads that may hang in a native library when the program ends."""

from __future__ import annotations

import threading
import weakref

_abandonable: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def mark_abandonable(thread: threading.Thread) -> None:
    """Mark a daemon thread that calls code that cannot be interrupted: FFmpeg, a compiler.

    The interpreter must not shut down while such a call is running: it crashes when the call
    returns. The program then ends with ``os._exit``.
    """
    _abandonable.add(thread)


def is_any_running() -> bool:
    """Return whether a marked thread is still running."""
    return any(thread.is_alive() for thread in list(_abandonable))
