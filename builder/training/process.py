"""The process of a training run: its signals and its memory."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Let glibc keep freed memory: getting large blocks from the system takes 1/6 of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """Turn SIGINT into an event, so that the run ends between two steps."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def ignore_interrupt(_: int) -> None:
    """Ignore SIGINT in a worker: a terminal sends it to all, and the main process saves the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
