"""Signals in a training run and in its workers."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
