"""Secrets: reads a password or a key from a file or an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

from maskcast.engines.errors import InputError


def read_secret(file: str | Path | None, variable: str) -> str | None:
    """Return a file's content without surrounding whitespace; without a file, the variable's value.

    Returns None if there is no file and the variable is unset or empty.

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
