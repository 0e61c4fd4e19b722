"""Log: one line an event, for people and machines, on the standard library's logging.

A module logs an event by a name that never changes and gives what belongs to it as fields::

    _logger.warning("source_state", extra=fields(source="door", state="stalled"))

The program decides with ``configure`` what is shown and how; a library user's own handlers get the
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

ROOMS = ("maskcast",)
"""Whose events are shown; other libraries' only from warnings on."""

REPEAT_EVERY_S = 60.0
"""A fault that repeats is told of at once, and then no more often than this."""

_FIELDS = "fields"


def fields(**values: object) -> dict[str, Mapping[str, object]]:
    """Return what belongs to an event, for ``extra``; None is left out."""
    return {_FIELDS: {key: value for key, value in values.items() if value is not None}}


def configure(level: str = "warning", form: str = "text") -> None:
    """Send events to stderr, a line each.

    Args:
        level: the least that is shown: "debug", "info", "warning" or "error".
        form: "text" (``key=value``) or "json".

    Raises:
        InputError: the level or the form is none of these.
    """
    if level not in get_args(LogLevel):
        raise InputError(f"log level {level!r}: use {', '.join(get_args(LogLevel))}")
    if form not in get_args(LogFormat):
        raise InputError(f"log format {form!r}: use {' or '.join(get_args(LogFormat))}")
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    for room in ROOMS:
        logging.getLogger(room).setLevel(level.upper())


def event(record: logging.LogRecord) -> dict[str, object]:
    """Return a record as one flat mapping, ready to be shown: no credentials, no line breaks."""
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
        shown["traceback"] = "\n".join(map(redact, lines))  # a whole one is too long for redact
    return {key: value if key == "traceback" else _plain(value) for key, value in shown.items()}


class TextFormatter(logging.Formatter):
    """``time=… level=warning event=source_state source=door state=stalled``.

    A value with blanks, quotes or ``=`` in it stands in quotes, as a JSON string.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return " ".join(f"{key}={_quoted(value)}" for key, value in event(record).items())


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the same keys as ``TextFormatter``'s."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return json.dumps(event(record), ensure_ascii=False)


class RepeatFilter(logging.Filter):
    """Lets a source's fault pass at once when it is new, and then once in ``REPEAT_EVERY_S``.

    One that passes after others were held back carries their number, ``suppressed``. Faults are
    told apart by source, event, ``state`` and ``file``; what names no source, or is no warning,
    always passes. Faults that have not been seen for long are forgotten.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._told: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record passes."""
        values: Mapping[str, object] = getattr(record, _FIELDS, {})
        if record.levelno < logging.WARNING or "source" not in values:
            return True
        now_s = self._clock()
        key = (values["source"], record.msg, values.get("state"), values.get("file"))
        told_s, suppressed = self._told.get(key, (-REPEAT_EVERY_S, 0))
        if now_s - told_s < REPEAT_EVERY_S:
            self._told[key] = told_s, suppressed + 1
            return False
        # A fault whose repetitions were held back is kept a little longer: their number is owed.
        self._told = {
            old: (at_s, count)
            for old, (at_s, count) in self._told.items()
            if now_s - at_s < REPEAT_EVERY_S * (10 if count else 1)
        }
        self._told[key] = now_s, 0
        if suppressed:
            setattr(record, _FIELDS, {**values, "suppressed": suppressed})
        return True


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is now: the live table puts another one in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """What stderr is now."""
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        raise AttributeError("stderr is looked up at each line")


def _plain(value: object) -> object:
    """Return a value that JSON knows; texts without credentials."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    bare = text and text.isprintable() and not any(sign in text for sign in ' "=')
    return text if bare else json.dumps(text, ensure_ascii=False)
