"""Fifo: a named pipe, read so that its reader can be stopped."""

from __future__ import annotations

import os
import select
import stat
import threading
from pathlib import Path

_POLL_MS = 100


def is_fifo(path: Path) -> bool:
    """Tell whether a path is a named pipe, or a link to one, like ``/dev/stdin`` in a shell."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


class Fifo:
    """A file object for ``av.open``.

    FFmpeg would block in the kernel, beyond the reach of ``stop``, until a process opens the pipe
    for writing, and in every read. This object waits for both with a timeout.

    Args:
        path: the pipe.
        stopping: once it is set, the pipe is at its end.
    """

    def __init__(self, path: Path, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLIN | select.POLLHUP)

    def read(self, size: int = -1) -> bytes:
        """Wait for data and return it; at the end, or once stopped, return no bytes."""
        while not self._stopping.is_set():
            if self._poll.poll(_POLL_MS):
                return os.read(self._file, size if size > 0 else 1 << 16)
        return b""

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._file)
