from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maskcast.pipeline.tracking.assignment import best_pairs


def best_sum(gain):
    """Return the greatest sum, found by trying every pairing."""
    if gain.shape[0] > gain.shape[1]:
        gain = gain.T
    rows, columns = gain.shape
    useful = np.maximum(gain, 0)
    return max(useful[range(rows), list(p)].sum() for p in permutations(range(columns), rows))


GAINS = st.tuples(st.integers(1, 5), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.sampled_from([-1.0, 0, 0.1, 0.25, 0.5, 1]))
)


@given(GAINS)
def test_no_other_pairing_gains_more(gain):
    pairs = best_pairs(gain)
    rows, columns = [i for i, _ in pairs], [j for _, j in pairs]
    assert rows == sorted(set(rows))
    assert len(set(columns)) == len(columns)
    assert all(gain[pair] > 0 for pair in pairs)
    assert np.isclose(sum(gain[pair] for pair in pairs), best_sum(gain))


def test_no_rows_or_no_columns_make_no_pairs():
    assert best_pairs(np.zeros((0, 3))) == []
    assert best_pairs(np.zeros((3, 0))) == []


def test_a_row_takes_its_second_choice_if_the_sum_is_greater():
    assert best_pairs(np.array([[0.9, 0.8], [0.85, 0.0]])) == [(0, 1), (1, 0)]


def test_a_hundred_rows_that_compete_for_every_column_are_solved():
    rng = np.random.default_rng(0)
    gain = rng.random((100, 100))
    pairs = best_pairs(gain)
    assert len(pairs) == 100
    # In an optimal pairing, no two rows gain more together by a swap.
    chosen = dict(pairs)
    for a in range(100):
        for b in range(a):
            swapped = gain[a, chosen[b]] + gain[b, chosen[a]]
            assert gain[a, chosen[a]] + gain[b, chosen[b]] >= swapped - 1e-9
