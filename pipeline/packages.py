"""Packages of the extras, which an installation may lack."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from maskcast.engines.errors import InputError


def check_installed(packages: Iterable[str], feature: str, extra: str) -> None:
    """Check that the packages of an extra are installed.

    Args:
        packages: import names of the packages.
        feature: what needs them, for the message.
        extra: the extra that installs them.

    Raises:
        InputError: one is missing.
    """
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # a parent package is missing
            found = None
        if found is None:
            raise InputError(
                f"{feature} needs {package}, which is not installed; install the {extra} extra: "
                f"pip install 'maskcast[{extra}]', or in a checkout pip install '.[{extra}]'"
            )
