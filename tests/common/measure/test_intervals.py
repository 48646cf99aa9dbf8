import math

import pytest

from common.measure.intervals import Bound, Interval, Side


def test_an_interval_that_is_out_of_order_or_not_finite_cannot_exist():
    for low, estimate, high in ((0.6, 0.5, 0.7), (0.4, 0.5, 0.45), (math.nan, 0.5, 0.6), (0.4, 0.5, math.inf)):
        with pytest.raises(ValueError, match=r"interval|low <="):
            Interval(low=low, estimate=estimate, high=high, confidence=0.95)


def test_a_bound_that_is_not_finite_or_has_no_confidence_cannot_exist():
    with pytest.raises(ValueError, match="finite"):
        Bound(value=math.nan, side=Side.UPPER, confidence=0.95)
    with pytest.raises(ValueError, match="confidence"):
        Bound(value=0.5, side=Side.UPPER, confidence=95.0)


def test_an_interval_keeps_an_estimate_that_noise_carried_below_zero():
    assert Interval(low=-0.02, estimate=-0.001, high=0.02, confidence=0.95).estimate == -0.001
