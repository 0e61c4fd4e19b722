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
    meter.changed("b", StateChange(state, "no frame for 2.0 s"))
    health = check_health(meter.stats())
    assert not health.healthy
    assert health.problems == [f"b is {state}: no frame for 2.0 s"]


def test_a_source_that_is_not_required_may_be_absent() -> None:
    meter = streaming("a", "b")
    meter.changed("b", StateChange(SourceState.RECONNECTING, "no answer"))
    health = check_health(meter.stats(), optional={"b"})
    assert health.healthy
    assert health.sources["b"] == "reconnecting"


@pytest.mark.parametrize("why", ["end of stream", "limit", "stopped"])
def test_a_file_that_was_read_to_its_end_is_not_a_problem(why: str) -> None:
    meter = streaming("a")
    meter.ended("a", why, 0)
    assert check_health(meter.stats()).healthy


def test_a_lost_source_is_a_problem() -> None:
    meter = streaming("a")
    meter.ended("a", "a.mp4: it breaks off", 0)
    assert check_health(meter.stats()).problems == ["a is ended: a.mp4: it breaks off"]


def test_a_stuck_stage_is_a_problem() -> None:
    meter = streaming("a")
    assert check_health(meter.stats(at_work_s={"infer": STUCK_AFTER_S - 1})).healthy
    health = check_health(meter.stats(at_work_s={"infer": STUCK_AFTER_S + 2.4}))
    assert health.problems == ["infer has been at work on one item for 12 s"]


def test_a_clock_before_1970_is_a_problem_since_no_message_can_carry_it() -> None:
    assert check_health(streaming("a").stats(), now_s=0.0).healthy
    (problem,) = check_health(streaming("a").stats(), now_s=-86_400.0).problems
    assert problem.startswith("the system clock is before 1970")
