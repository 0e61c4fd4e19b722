"""Log: one line per event, for people and machines, on top of the standard library's logging.

A module logs an event under a stable name, with its details as fields::

    _logger.warning("source_state", extra=fields(source="door", state="stalled"))

The program chooses level and format with ``configure``; the handlers of a library user receive the
same records.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, get_args

from maskcast.engines.errors import InputError
from maskcast.pipeline.url import redact

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

LOGGER = "maskcast"
"""The logger whose level is set; other libraries log warnings and errors only."""

REPEAT_EVERY_S = 60.0
"""A repeated fault is logged at once, and then at most once in this many seconds."""

_FIELDS = "fields"


def fields(**values: object) -> dict[str, Mapping[str, object]]:
    """Return an event's details for ``extra``; None values are left out."""
    return {_FIELDS: {key: value for key, value in values.items() if value is not None}}


def configure(level: str = "warning", form: str = "text") -> None:
    """Log events to stderr, one line each.

    Args:
        level: the minimum level: "debug", "info", "warning" or "error".
        form: "text" (``key=value``) or "json".

    Raises:
        InputError: the level or the form is unknown.
    """
    if level not in get_args(LogLevel):
        raise InputError(f"unknown log level {level!r}: use {', '.join(get_args(LogLevel))}")
    if form not in get_args(LogFormat):
        raise InputError(f"unknown log format {form!r}: use {' or '.join(get_args(LogFormat))}")
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger(LOGGER).setLevel(level.upper())


def event(record: logging.LogRecord) -> dict[str, object]:
    """Return a record as one flat mapping, without credentials."""
    at = datetime.fromtimestamp(record.created, UTC)
    shown: dict[str, object] = {
        "time": f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03}Z",
        "level": record.levelname.lower(),
        "event": record.getMessage(),
        **getattr(record, _FIELDS, {}),
        "logger": record.name,
    }
    if record.exc_info:
        lines = logging.Formatter().formatException(record.exc_info).splitlines()
        shown["traceback"] = "\n".join(map(redact, lines))  # line by line: redact cuts long texts
    return {key: value if key == "traceback" else _plain(value) for key, value in shown.items()}


class TextFormatter(logging.Formatter):
    """``time=… level=warning event=source_state source=door state=stalled``.

    A value that contains spaces, quotes or ``=`` is written as a JSON string.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return " ".join(f"{key}={_quoted(value)}" for key, value in event(record).items())


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the keys of ``TextFormatter``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return json.dumps(event(record), ensure_ascii=False)


class RepeatFilter(logging.Filter):
    """Passes a source's new fault at once, and its repetitions once in ``REPEAT_EVERY_S``.

    A record that passes after others were suppressed has their number as ``suppressed``. Faults are
    distinguished by source, event, ``state`` and ``file``. Records without a source, and those
    below warning, always pass. Faults that have not recurred for some time are forgotten.

    Args:
        clock: a monotonic clock, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._passed: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record passes."""
        values: Mapping[str, object] = getattr(record, _FIELDS, {})
        if record.levelno < logging.WARNING or "source" not in values:
            return True
        now_s = self._clock()
        key = (values["source"], record.msg, values.get("state"), values.get("file"))
        passed_s, suppressed = self._passed.get(key, (-REPEAT_EVERY_S, 0))
        if now_s - passed_s < REPEAT_EVERY_S:
            self._passed[key] = passed_s, suppressed + 1
            return False
        # One with suppressed repetitions is kept longer, so that their number can be logged.
        self._passed = {
            old: (at_s, count)
            for old, (at_s, count) in self._passed.items()
            if now_s - at_s < REPEAT_EVERY_S * (10 if count else 1)
        }
        self._passed[key] = now_s, 0
        if suppressed:
            setattr(record, _FIELDS, {**values, "suppressed": suppressed})
        return True


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current ``sys.stderr``, which the live table replaces."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """The current ``sys.stderr``."""
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        raise AttributeError("sys.stderr is read for each line")


def _plain(value: object) -> object:
    """Return a value as a JSON type; texts without credentials."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    bare = text and text.isprintable() and not any(character in text for character in ' "=')
    return text if bare else json.dumps(text, ensure_ascii=False)
