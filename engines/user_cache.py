"""The user's cache folder, and files that are never seen half written."""

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


def write_whole(path: Path, *parts: bytes, suffix: str = "") -> None:
    """Write a file of an existing folder under another name, which ends in ``suffix``; rename it.

    Raises:
        OSError: it cannot be written; the file under the other name is deleted.
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
