import pytest

from maskcast.pipeline.monitor.health import STUCK_AFTER_S, check_health
from maskcast.pipeline.sources.state import SourceState, StateChange
from maskcast.pipeline.stats import Meter


def streaming(*names: str) -> Meter:
    meter = Meter(names)
    for name in names:
        meter.changed(name, StateChange(SourceState.STREAMING))
    return meter


def test_a_pipeline_whose_sources_stream_is_healthy() -> None:
    health = check_health(streaming("a", "b").stats())
    assert (health.healthy, health.problems) == (True, [])
    assert health.sources == {"a": "streaming", "b": "streaming"}


@pytest.mark.parametrize(
    "state", [SourceState.CONNECTING, SourceState.STALLED, SourceState.RECONNECTING]
)
def test_a_source_that_does_not_stream_is_named_with_the_reason(state: SourceState) -> None:
    meter = streaming("a", "b")
    meter.changed("b", StateChange(state, "no picture for 2.0 s"))
    health = check_health(meter.stats())
    assert not health.healthy
    assert health.problems == [f"b is {state}: no picture for 2.0 s"]


def test_a_source_that_is_not_required_may_be_away() -> None:
    meter = streaming("a", "b")
    meter.changed("b", StateChange(SourceState.RECONNECTING, "no answer"))
    health = check_health(meter.stats(), optional={"b"})
    assert health.healthy
    assert health.sources["b"] == "reconnecting"


@pytest.mark.parametrize("why", ["end of stream", "limit", "stopped"])
def test_a_file_that_was_read_to_its_end_is_no_fault(why: str) -> None:
    meter = streaming("a")
    meter.ended("a", why, 0)
    assert check_health(meter.stats()).healthy


def test_a_source_that_was_lost_is_one() -> None:
    meter = streaming("a")
    meter.ended("a", "a.mp4: it breaks off", 0)
    assert check_health(meter.stats()).problems == ["a is ended: a.mp4: it breaks off"]


def test_a_stage_that_does_not_get_done_is_one() -> None:
    meter = streaming("a")
    assert check_health(meter.stats(at_work_s={"infer": STUCK_AFTER_S - 1})).healthy
    health = check_health(meter.stats(at_work_s={"infer": STUCK_AFTER_S + 2.4}))
    assert health.problems == ["infer has been at one piece of work for 12 s"]
