import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.pipeline.durations import BOUNDS_S, WINDOW, Distribution, Durations, percentiles_ms

MS = 1_000_000


def distribution(*durations_ns: int) -> Distribution:
    durations = Durations()
    for duration_ns in durations_ns:
        durations.add(duration_ns)
    return durations.distribution()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 20 * 10**9), max_size=30))
def test_every_duration_is_in_the_bucket_of_the_least_bound_that_it_does_not_exceed(
    durations_ns: list[int],
) -> None:
    found = distribution(*durations_ns)
    for place, bound_s in enumerate(BOUNDS_S):
        below = sum(duration_ns <= round(bound_s * 1e9) for duration_ns in durations_ns)
        assert sum(found.counts[: place + 1]) == below
    assert found.count == len(durations_ns)
    assert found.sum_s == pytest.approx(sum(durations_ns) / 1e9)


def test_a_bound_itself_belongs_to_its_bucket() -> None:
    assert distribution(10 * MS).counts[BOUNDS_S.index(0.01)] == 1
    assert distribution(10 * MS + 1).counts[BOUNDS_S.index(0.01) + 1] == 1


def test_percentiles_are_of_the_last_durations_and_the_histogram_of_all() -> None:
    found = distribution(*[MS] * 1000, *[3 * MS] * WINDOW)
    assert found.percentiles_ms == pytest.approx((3, 3, 3))
    assert found.count == 1000 + WINDOW
    assert found.mean_ms == pytest.approx((1000 + 3 * WINDOW) / (1000 + WINDOW))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=50))
def test_percentiles_are_those_of_numpy(durations_ns: list[int]) -> None:
    expected = np.percentile(np.array(durations_ns) / 1e6, [50, 95, 99])
    assert distribution(*durations_ns).percentiles_ms == pytest.approx(expected)


def test_distributions_are_taken_together() -> None:
    together = percentiles_ms([distribution(*[MS] * 99), distribution(), distribution(5 * MS)])
    assert together is not None
    assert together.p50 == pytest.approx(1)
    assert together.p99 == pytest.approx(1.04)


def test_no_durations_give_no_percentiles() -> None:
    assert distribution().percentiles_ms is None
    assert distribution().mean_ms == 0
    assert Distribution().percentiles_ms is None
    assert percentiles_ms([]) is None


def test_a_distribution_does_not_change_with_what_comes_later() -> None:
    durations = Durations()
    durations.add(MS)
    found = durations.distribution()
    durations.add(9 * MS)
    assert found.count == 1
    assert found.recent_ns.tolist() == [MS]
