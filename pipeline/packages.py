"""Packages of the extras, which an installation may lack."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from maskcast.engines.errors import InputError


def check_installed(packages: Iterable[str], user: str, extra: str) -> None:
    """Check that the packages of an extra are installed.

    Args:
        packages: names to import.
        user: what needs them, for the message.
        extra: what to install.

    Raises:
        InputError: one is missing.
    """
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # the package above it is missing
            found = None
        if found is None:
            raise InputError(
                f"{user} needs {package}, which is not installed; install the {extra} extra: "
                f"pip install 'maskcast[{extra}]', or in a checkout pip install '.[{extra}]'"
            )
