"""The packages of the builder extra, which an installation for running models lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from maskcast.engines.errors import InputError


@contextmanager
def builder_extra() -> Iterator[None]:
    """Raise an ``InputError`` that says what to install if a package of the extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "maskcast":
            raise
        raise InputError(
            f"this command needs {package}, which is not installed; install the builder extra: "
            "pip install 'maskcast[builder]', or in a checkout pip install '.[builder]'"
        ) from None
