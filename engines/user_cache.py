"""The user's cache folder, and files that are written atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path | None:
    """Return this package's folder in the user's cache; None if the user has no home."""
    root = os.environ.get("XDG_CACHE_HOME")
    if not root:
        try:
            root = str(Path.home() / ".cache")
        except RuntimeError:
            return None
    return Path(root) / "maskcast"


def write_atomically(path: Path, *parts: bytes, suffix: str = "") -> None:
    """Write a file to an existing folder under a temporary name ending in ``suffix``; rename it.

    Raises:
        OSError: the file cannot be written; the temporary file is deleted.
    """
    number, name = tempfile.mkstemp(suffix, dir=path.parent)
    pending = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.writelines(parts)
        pending.replace(path)
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
