"""Aggregation: public weights, no dependence on order, one broken site cannot pull the mean away."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.generator.weights import Weights
from server.aggregation import moving_average, screen, update_norm, weighted_mean


def weights(*values: float) -> Weights:
    return Weights({"layer": np.array(values, dtype=np.float32)})


EQUAL = {"a": 1.0, "b": 1.0, "c": 1.0}
ZERO = dict.fromkeys("abc", weights(0))


def test_equal_weights_give_the_mean():
    mean = weighted_mean({"a": weights(1, 2), "b": weights(3, 6)}, EQUAL)
    assert mean.arrays["layer"].tolist() == [2, 4]


def test_a_site_with_weight_three_counts_three_times():
    mean = weighted_mean({"a": weights(0), "b": weights(4)}, {"a": 1.0, "b": 3.0})
    assert mean.arrays["layer"].tolist() == [3]


def test_weights_of_absent_sites_are_shared_by_those_present():
    mean = weighted_mean({"a": weights(1), "b": weights(3)}, {"a": 1.0, "b": 1.0, "absent": 98.0})
    assert mean.arrays["layer"].tolist() == [2]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3))
def test_the_order_of_replies_changes_no_bit(values: list[float]):
    replies = [(name, weights(value)) for name, value in zip("abc", values, strict=True)]
    assert len({weighted_mean(dict(order), EQUAL).digest for order in permutations(replies)}) == 1


def test_no_replies_cannot_be_averaged():
    with pytest.raises(ValueError, match="no replies"):
        weighted_mean({}, EQUAL)


def test_replies_of_other_shapes_cannot_be_averaged():
    with pytest.raises(ValueError, match="shapes"):
        weighted_mean({"a": weights(1), "b": weights(1, 2)}, EQUAL)


def test_a_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match="positive"):
        weighted_mean({"a": weights(1)}, {"a": 0.0})


def test_update_norm_is_the_length_of_the_difference_over_all_arrays():
    start = Weights({"x": np.zeros(2, np.float32), "y": np.ones(1, np.float32)})
    end = Weights({"x": np.array([3, 0], np.float32), "y": np.array([5], np.float32)})
    assert update_norm(start, end) == pytest.approx(5.0)


def test_an_update_far_longer_than_the_median_is_left_out():
    screened = screen(ZERO, {"a": weights(1), "b": weights(1.5), "c": weights(-30)})
    assert screened.kept == ("a", "b")
    assert screened.excluded == {"c": pytest.approx(20.0)}


def test_an_update_is_measured_from_what_its_own_site_was_sent():
    starts = {"a": weights(0), "b": weights(100), "c": weights(-100)}
    assert screen(starts, {"a": weights(1), "b": weights(101.5), "c": weights(-130)}).kept == ("a", "b")
    assert screen(starts, {"a": weights(1), "b": weights(101), "c": weights(-99)}).excluded == {}


def test_updates_of_similar_length_are_all_kept():
    assert screen(ZERO, {"a": weights(1), "b": weights(2), "c": weights(-4)}).excluded == {}


def test_two_sites_are_never_screened_because_their_median_blames_nobody():
    assert screen(ZERO, {"a": weights(1e-6), "b": weights(100)}).kept == ("a", "b")


def test_a_site_is_kept_when_most_sites_changed_nothing():
    assert screen(ZERO, {"a": weights(0), "b": weights(0), "c": weights(1)}).kept == ("a", "b", "c")


def test_the_average_over_rounds_starts_with_the_first_round_and_then_decays():
    first = moving_average(None, weights(8), 0.75)
    assert first.arrays["layer"].tolist() == [8]
    assert moving_average(first, weights(0), 0.75).arrays["layer"].tolist() == [6]


def test_without_decay_the_average_is_the_last_round():
    assert moving_average(weights(8), weights(1), 0.0).arrays["layer"].tolist() == [1]
