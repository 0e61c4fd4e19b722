"""Files as sources: folders of images or videos, and named pipes."""

from __future__ import annotations

import os
import select
import stat
import threading
from pathlib import Path

from maskcast.engines.errors import InputError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
    | {".ts", ".webm", ".wmv"}
)

_POLL_MS = 100


def holds_videos(folder: Path) -> bool:
    """Tell whether a folder contains videos and no images."""
    suffixes = {file.suffix.lower() for file in _files(folder)}
    return not suffixes & IMAGE_SUFFIXES and bool(suffixes & VIDEO_SUFFIXES)


def list_files(path: Path, suffixes: frozenset[str]) -> list[Path]:
    """Return the files with these suffixes in a folder, by name; for a file, the file.

    Raises:
        InputError: the folder cannot be read, or contains no such file.
    """
    if not path.is_dir():
        return [path]
    found = [file for file in _files(path) if file.suffix.lower() in suffixes]
    if not found:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise InputError(f"{path}: the folder contains no images or videos; expected {kinds}")
    return found


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None


def is_fifo(path: Path) -> bool:
    """Tell whether a path is a named pipe, or a link to one, like ``/dev/stdin`` in a shell."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


class Fifo:
    """A named pipe as a file object for ``av.open``.

    FFmpeg itself would block in the kernel until a process opens the pipe for writing, and in every
    read, where ``stop`` cannot interrupt it. This object polls instead.

    Args:
        path: the pipe.
        stopping: an event that makes ``read`` report the end of the pipe.
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
