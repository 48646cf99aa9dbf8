"""Noise on a sum over patients: its law, its grid, and what the grid costs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.randomness import PAIRS_AT_ONCE, SecureStream
from client.training.noise import noisy
from common.privacy.noise_grid import ARITHMETIC_ERROR, SENSITIVITY_SLACK, grid_of

ZEROS = torch.zeros(20_000)


def stream(*labels):
    return SecureStream.from_seed(0, "noise", *labels)


def test_the_noise_has_the_deviation_that_was_asked_for():
    drawn = noisy(ZEROS, scale=3.0, stream=stream()).double().numpy() / 3.0
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


@pytest.mark.parametrize("wrong", [2.0, 4.5])
def test_noise_a_third_too_small_or_half_too_large_would_be_noticed(wrong):
    drawn = noisy(ZEROS, scale=wrong, stream=stream()).double().numpy() / 3.0
    assert stats.kstest(drawn, "norm").pvalue < 1e-6


def test_the_noise_is_never_smaller_than_asked_for():
    """The slack, which covers the rounding of the sum, is there: 4e6 draws tell 1.001 from 1."""
    drawn = noisy(torch.zeros(4_000_000), scale=1.0, stream=stream()).double()
    expected = (1 + SENSITIVITY_SLACK) ** 2
    assert drawn.square().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(2 / 4e6))
    assert SENSITIVITY_SLACK >= 90**2 * 2**-23  # ninety vectors, added in the worst order, with and without a patient


def test_the_same_noise_is_added_whatever_the_sum():
    total = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    added = noisy(total, scale=2.0, stream=stream()) - noisy(torch.zeros(50_000), scale=2.0, stream=stream())
    assert (added - total).abs().max() <= 1.01 * grid_of(2.0)


@given(st.floats(1e-6, 1e6), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=50, deadline=None)
def test_only_multiples_of_a_public_step_come_out(scale, dtype):
    total = torch.full((301,), 0.1 * scale, dtype=dtype)
    steps = noisy(total, scale=scale, stream=stream()).double() / grid_of(scale)
    assert torch.equal(steps, steps.round())  # exact: the step is a power of two and float32 holds its multiples


def test_where_on_the_grid_a_value_falls_does_not_tell_the_sum():
    """The last bits are uniform for sums that lie on the grid, between its points and off every float."""
    for sum_ in (0.0, 0.5 * grid_of(1.0), 1 / 3):
        drawn = noisy(torch.full((100_000,), sum_), scale=1.0, stream=stream(str(sum_)))
        last = (drawn.double() / grid_of(1.0)).long() % 16
        assert stats.chisquare(torch.bincount(last, minlength=16).numpy()).pvalue > 1e-3


def test_rounding_is_to_the_nearest_so_it_has_no_bias():
    drawn = noisy(torch.full((400_000,), 0.4 * grid_of(1.0)), scale=1.0, stream=stream()).double()
    noise = noisy(torch.zeros(400_000), scale=1.0, stream=stream()).double()
    assert (drawn - noise).mean().item() == pytest.approx(0.4 * grid_of(1.0), rel=0.02)


@pytest.mark.parametrize("n", [0, 1, 7, 2 * PAIRS_AT_ONCE, 2 * PAIRS_AT_ONCE + 1])
def test_any_number_of_coordinates_is_noised_block_by_block(n):
    drawn = noisy(torch.zeros(n, dtype=torch.float64), scale=1.0, stream=stream())
    normals = stream().normal(n) * (1 + SENSITIVITY_SLACK)
    np.testing.assert_allclose(drawn.numpy(), normals, rtol=0, atol=0.51 * grid_of(1.0))


def test_shape_and_type_are_the_sums():
    total = torch.ones(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    drawn = noisy(total, scale=1.0, stream=stream())
    assert (drawn.shape, drawn.dtype, drawn.requires_grad) == ((3, 4, 5), torch.bfloat16, False)
    again = noisy(total, scale=1.0, stream=stream())
    assert torch.equal(drawn, again)
    assert torch.equal(total, torch.ones(3, 4, 5, dtype=torch.bfloat16))  # the sum itself is left alone


def test_two_steps_never_share_their_noise():
    moving = stream()
    first, second = noisy(ZEROS, scale=1.0, stream=moving), noisy(ZEROS, scale=1.0, stream=moving)
    assert abs(np.corrcoef(first.numpy(), second.numpy())[0, 1]) < 4 / math.sqrt(len(ZEROS))


def test_without_noise_the_sum_comes_back_as_it_is():
    total = torch.randn(5)
    assert noisy(total, scale=0.0, stream=stream()) is total


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_a_scale_that_is_no_deviation_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        noisy(ZEROS, scale=scale, stream=stream())


def test_the_arithmetic_is_as_exact_as_the_bound_assumes():
    """Against 40 digits: a normal from its words, and its sum with 16 deviations."""
    mp = pytest.importorskip("mpmath")
    from client.gaussian import BoxMuller

    mp.mp.dps = 40
    drawn = np.frombuffer(stream().bytes(16 * 500), dtype="<i8").copy()
    found = BoxMuller(500).normals(drawn.copy(), 1.0)
    for i in range(500):
        radius, angle = int(drawn[i]), int(drawn[500 + i])
        uniform = (abs(radius) + (mp.mpf(angle % 2**11) + 0.5) / 2**11) / mp.mpf(2) ** 63
        point = mp.sqrt(-2 * mp.log(uniform)) * (1 if radius >= 0 else -1)
        turn = mp.mpf(angle) / 2**64 * mp.pi
        assert abs(point * mp.cos(turn) - mp.mpf(found[i])) < ARITHMETIC_ERROR / 2
        assert abs(point * mp.sin(turn) - mp.mpf(found[500 + i])) < ARITHMETIC_ERROR / 2
    assert ARITHMETIC_ERROR / 2 > (16 + 10.2) * 2**-53  # rounding of the sum
