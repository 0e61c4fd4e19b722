from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskcast.pipeline.sources.live import MAX_STEP_S, PresentationClock

TIMES = st.one_of(st.none(), st.floats(-1e9, 1e9), st.sampled_from([0.0, 1.0, 86400.0]))


@given(times_s=st.lists(TIMES, max_size=50), interval_s=st.floats(0.001, 2))
def test_times_always_increase(times_s, interval_s: float) -> None:
    clock = PresentationClock()
    given_s = [clock.time_s(time_s, index * interval_s) for index, time_s in enumerate(times_s)]
    assert all(before < after for before, after in pairwise(given_s))
    assert all(after - before <= MAX_STEP_S + 1e-6 for before, after in pairwise(given_s))


@given(start_s=st.floats(-1e5, 1e5), steps_s=st.lists(st.floats(0.001, 9), max_size=50))
def test_the_steps_of_increasing_times_are_kept(start_s: float, steps_s: list[float]) -> None:
    clock = PresentationClock()
    stream_s = start_s
    given_s = [clock.time_s(stream_s, 0.0)]
    for index, step_s in enumerate(steps_s):
        stream_s += step_s
        given_s.append(clock.time_s(stream_s, index * 100.0))  # bursts and pauses of the network
    assert given_s[-1] == pytest.approx(sum(steps_s), abs=1e-4)


@pytest.mark.parametrize(
    ("stream_s", "expected_s"),
    [
        ([10.0, 10.1, 0.0, 0.1], [0, 0.1, 0.6, 0.7]),  # a camera that was restarted
        ([10.0, 10.1, 10.1, 10.2], [0, 0.1, 0.6, 0.7]),  # a repeat
        ([10.0, 10.1, 9999.0, 9999.1], [0, 0.1, 0.6, 0.7]),  # a jump
        ([47721.8, 47721.9, 0.0, 0.1], [0, 0.1, 0.6, 0.7]),  # RTP's 32 bits at 90 kHz wrap
        ([None, None, 0.0, 0.1], [0, 0.5, 1.0, 1.1]),  # a clock that is known late
    ],
)
def test_arrival_times_replace_a_broken_clock(stream_s, expected_s) -> None:
    clock = PresentationClock()
    given_s = [clock.time_s(time_s, index * 0.5) for index, time_s in enumerate(stream_s)]
    assert given_s == pytest.approx(expected_s)


def test_the_frame_after_one_without_a_time_is_at_least_an_interval_later() -> None:
    clock = PresentationClock()
    burst = [clock.time_s(None, 5.0, 0.04), clock.time_s(0.04, 5.001, 0.04)]
    assert burst == pytest.approx([0, 0.04])
    assert clock.time_s(0.08, 5.002, 0.04) == pytest.approx(0.08)
    late = PresentationClock()
    assert [late.time_s(None, 5.0, 0.04), late.time_s(0.2, 5.2, 0.04)] == pytest.approx([0, 0.2])


def test_without_any_times_frames_are_as_far_apart_as_they_arrived() -> None:
    clock = PresentationClock()
    given_s = [clock.time_s(None, index * 0.01, 0.04) for index in range(4)]
    assert given_s == pytest.approx([0, 0.01, 0.02, 0.03])


def test_the_times_of_two_connections_are_not_compared() -> None:
    clock = PresentationClock()
    clock.time_s(7.0, 100.0, 0.04)
    clock.reconnect()
    assert clock.time_s(7.04, 103.0, 0.04) == pytest.approx(3.0)
    assert clock.time_s(7.08, 103.2, 0.04) == pytest.approx(3.04)
