import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline import log
from maskcast.pipeline.log import REPEAT_EVERY_S, RepeatFilter, configure, fields

logger = logging.getLogger("maskcast.pipeline.test")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Restore the configuration of logging after each test."""
    root, own = logging.getLogger(), logging.getLogger(log.LOGGER)
    level = own.level
    yield
    for handler in [handler for handler in root.handlers if isinstance(handler, log.StderrHandler)]:
        root.removeHandler(handler)
    own.setLevel(level)


def test_an_event_is_one_line_of_keys_and_values(capsys) -> None:
    configure()
    logger.warning(
        "source_state", extra=fields(source="door", state="stalled", reason="no frame", gone=None)
    )
    (line,) = capsys.readouterr().err.splitlines()
    time, rest = line.split(" ", 1)
    assert time.startswith("time=2")
    assert time.endswith("Z")
    assert rest == (
        "level=warning event=source_state source=door state=stalled "
        'reason="no frame" logger=maskcast.pipeline.test'
    )


def test_an_event_may_be_a_json_object(capsys) -> None:
    configure("info", "json")
    logger.info("source_added", extra=fields(source="door", count=3, share=0.5, on=True))
    event = json.loads(capsys.readouterr().err)
    assert event.pop("time").endswith("Z")
    assert event == {
        "level": "info",
        "event": "source_added",
        "source": "door",
        "count": 3,
        "share": 0.5,
        "on": True,
        "logger": "maskcast.pipeline.test",
    }


def test_it_is_quiet_by_default(capsys) -> None:
    configure()
    logger.info("source_added")
    logging.getLogger("another.library").info("chatter")
    assert capsys.readouterr().err == ""
    configure("debug")
    logger.debug("detail")
    logging.getLogger("another.library").info("chatter")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_has_no_credentials_and_no_line_breaks(capsys, form: str) -> None:
    configure("info", form)
    url = "rtsp://admin:hunter2@camera/stream?token=hunter2"
    logger.warning("cannot read %s\nat all", url)
    logger.info("source_added", extra=fields(source="door", url=url, error=ValueError(url)))
    try:
        raise ValueError(url)
    except ValueError:
        logger.exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "hunter2" not in "".join(lines)
    assert "ValueError" in lines[2]
    assert "Traceback" in lines[2]


def test_a_repeated_fault_is_logged_at_once_and_then_once_a_minute() -> None:
    now_s = [1000.0]
    only = RepeatFilter(lambda: now_s[0])

    def passes(source: str | None = "door", state: str = "stalled", level: int = 30) -> object:
        extra = fields(source=source, state=state)
        record = logger.makeRecord("pipeline", level, "", 0, "source_state", (), None, extra=extra)
        return only.filter(record) and record.__dict__["fields"].get("suppressed", 0)

    assert passes() == 0
    assert [passes() for _ in range(5)] == [False] * 5
    assert passes(state="reconnecting") == 0  # another fault
    assert passes(source="yard") == 0  # another source
    assert [passes(level=20), passes(level=20)] == [0, 0]  # no fault
    assert [passes(source=None), passes(source=None)] == [0, 0]
    now_s[0] += REPEAT_EVERY_S - 1
    assert passes() is False
    now_s[0] += 1
    assert passes() == 6
    assert passes() is False
    now_s[0] += 2 * REPEAT_EVERY_S
    assert passes() == 1
    assert passes(source="yard") == 0


def test_faults_of_removed_sources_are_forgotten() -> None:
    now_s = [0.0]
    only = RepeatFilter(lambda: now_s[0])
    for number in range(2000):
        now_s[0] += 1
        extra = fields(source=f"cam{number}")
        assert only.filter(logger.makeRecord("p", 30, "", 0, "lost", (), None, extra=extra))
    assert len(only._passed) <= REPEAT_EVERY_S + 1


@pytest.mark.parametrize(("level", "form"), [("loud", "text"), ("info", "xml")])
def test_an_unknown_level_or_format_is_named(level: str, form: str) -> None:
    with pytest.raises(InputError, match=r"'loud': use debug|'xml': use text or json"):
        configure(level, form)


def test_stderr_is_read_for_each_line(capsys, monkeypatch) -> None:
    configure()
    other = io.StringIO()
    monkeypatch.setattr(sys, "stderr", other)  # as rich does while a live table is shown
    logger.warning("moved")
    assert capsys.readouterr().err == ""
    assert "event=moved" in other.getvalue()
