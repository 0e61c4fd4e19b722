"""Secrets: passwords and keys, from a file or an environment variable, never from an argument."""

from __future__ import annotations

import os
from pathlib import Path

from maskcast.engines.errors import InputError


def read_secret(file: str | Path | None, variable: str) -> str | None:
    """Return the content of a file without the newline, else the variable's; None without both.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(variable) or None
    try:
        secret = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{file}: cannot be read: {reason}") from None
    if not secret:
        raise InputError(f"{file}: is empty; write the secret into it")
    return secret
