"""Timing cache: TensorRT's measurements of kernels, so that a rebuild takes seconds."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskcast.engines.user_cache import write_atomically


def timing_cache_path() -> Path:
    """Return the path of the user's timing cache; the file may be missing."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "maskcast" / "tensorrt_timing"


def load_timing_cache(config: Any, path: Path) -> None:
    """Load a file's cache into a builder's configuration; an empty one if it does not match.

    TensorRT checks that it is of the same version and GPU.
    """
    content = b""
    with suppress(OSError):
        content = path.read_bytes()
    if not config.set_timing_cache(config.create_timing_cache(content), False) and content:
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timing_cache(config: Any, path: Path) -> None:
    """Write a configuration's cache to a file; do nothing if the folder is not writable."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bytes(memoryview(cache.serialize())))
