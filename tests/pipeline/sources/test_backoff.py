import random

from hypothesis import given
from hypothesis import strategies as st

from maskcast.pipeline.sources.backoff import Backoff


def test_waits_double_up_to_the_cap_and_restart_after_a_reset() -> None:
    backoff = Backoff(0.1, 1.0, uniform=lambda low, high: high)
    assert [backoff.next_s() for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    backoff.reset()
    assert backoff.next_s() == 0.1


@given(seed=st.integers(), tries=st.integers(1, 2000))
def test_no_wait_is_longer_than_the_cap_or_shorter_than_half_of_the_first(
    seed: int, tries: int
) -> None:
    backoff = Backoff(0.1, 1.0, random.Random(seed).uniform)
    waits_s = [backoff.next_s() for _ in range(tries)]
    assert all(0.05 <= wait_s <= 1.0 for wait_s in waits_s)


def test_two_cameras_that_failed_together_do_not_try_again_together() -> None:
    one, other = (Backoff(0.1, 1.0, random.Random(seed).uniform) for seed in range(2))
    assert all(one.next_s() != other.next_s() for _ in range(20))
