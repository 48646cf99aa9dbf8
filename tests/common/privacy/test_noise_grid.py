import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.privacy.noise_grid import GRID_BITS, grid_of, noise_statement, rounding_cost


@given(st.floats(1e-30, 1e30))
def test_the_step_is_a_power_of_two_near_a_thousandth_of_the_noise(scale):
    grid = grid_of(scale)
    assert math.frexp(grid)[0] == 0.5
    assert 2**GRID_BITS <= scale / grid < 2 ** (GRID_BITS + 1)


def test_what_floats_cost_is_far_below_what_is_stated():
    epsilon, delta = rounding_cost(parameters=12_000, steps=160, delta=1e-3)
    assert epsilon < 1e-5
    assert delta == pytest.approx(1e-5)
    assert rounding_cost(parameters=2_800_000, steps=1000, delta=1e-3)[0] < 1e-3
    assert rounding_cost(parameters=2_800_000, steps=1000, delta=1e-3)[0] > epsilon


def test_the_statement_says_where_noise_comes_from_and_what_is_not_covered():
    text = noise_statement(parameters=12_000, steps=160, delta=1e-3)
    for words in ("AES-256-CTR", "operating system", "rounded to a public grid", "Not covered", "time", "GPU"):
        assert words in text
