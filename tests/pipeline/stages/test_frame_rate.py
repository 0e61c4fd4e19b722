import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.stages.frame_rate import EveryNth, MaxFps, frame_rate_limiters


@given(n=st.integers(1, 10), frames=st.integers(0, 100))
def test_one_of_n_is_kept_beginning_with_the_first(n: int, frames: int) -> None:
    limiter = EveryNth(n)
    kept = [index for index in range(frames) if limiter.keeps(0.0)]
    assert kept == list(range(0, frames, n))


@given(
    fps=st.floats(0.1, 120),
    start_s=st.floats(-1e3, 1e3),
    steps_s=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=100),
)
def test_no_interval_has_more_frames_than_allowed(fps, start_s, steps_s) -> None:
    limiter, time_s = MaxFps(fps), start_s
    kept_s = [time_s] if limiter.keeps(time_s) else []
    for step_s in steps_s:
        time_s += step_s
        if limiter.keeps(time_s):
            kept_s.append(time_s)
    assert kept_s[0] == start_s
    for index, from_s in enumerate(kept_s):
        for count, to_s in enumerate(kept_s[index:]):
            assert count <= (to_s - from_s) * fps + 1.1 + 1e-3


@pytest.mark.parametrize(
    ("camera_fps", "fps", "expected"), [(30, 10, 100), (30, 30, 300), (25, 10, 100), (5, 10, 50)]
)
def test_a_steady_camera_is_limited_to_exactly_the_rate(camera_fps, fps, expected) -> None:
    limiter = MaxFps(fps)
    kept = sum(limiter.keeps(index / camera_fps) for index in range(10 * camera_fps))
    assert kept == pytest.approx(expected, abs=1)


def test_a_camera_that_jitters_at_the_maximum_rate_loses_almost_nothing() -> None:
    limiter = MaxFps(10)
    jitter_s = [0.0, 0.004, -0.004, 0.008, -0.008]
    times_s = [index / 10 + jitter_s[index % 5] for index in range(100)]
    assert sum(map(limiter.keeps, times_s)) >= 98


def test_a_clock_that_goes_back_stops_nothing() -> None:
    limiter = MaxFps(10)
    assert limiter.keeps(1000.0)
    assert limiter.keeps(0.0)
    assert not limiter.keeps(0.05)
    assert limiter.keeps(0.1)


def test_a_source_without_limits_keeps_every_frame() -> None:
    assert frame_rate_limiters(SourceConfig(url="a.mp4")) == []
    both = frame_rate_limiters(SourceConfig(url="a.mp4", every_nth=2, max_fps=5))
    assert [limiter.reason for limiter in both] == ["every_nth", "max_fps"]


@pytest.mark.parametrize(("key", "value"), [("every_nth", 0), ("max_fps", 0), ("max_fps", -1)])
def test_a_rate_that_keeps_nothing_is_refused(key: str, value: int) -> None:
    with pytest.raises(InputError, match=key):
        make_config({"sources": [{"url": "a.mp4", key: value}]})
