"""Quantities: parses durations and sizes with units, such as 10m and 500MB."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}


def parse_seconds(key: str, text: str | None) -> float | None:
    """Return a duration in seconds; None for None.

    Args:
        key: the name of the option or key, for the message.
        text: "30s", "10m", "1h" or "1d".

    Raises:
        ValueError: the number or the unit is missing, or the number is 0.
    """
    return _parse(key, text, _SECONDS, "30s, 10m, 1h or 1d")


def parse_bytes(key: str, text: str | None) -> float | None:
    """Return a size in bytes ("500kB", "500MB", "2GB"), like ``parse_seconds``."""
    return _parse(key, text, _BYTES, "500kB, 500MB or 2GB")


def _parse(key: str, text: str | None, units: Mapping[str, float], examples: str) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if found is None or found[2].lower() not in units or not float(found[1]):
        raise ValueError(f"{key}: {text!r}: use a number and a unit, as in {examples}")
    return float(found[1]) * units[found[2].lower()]
