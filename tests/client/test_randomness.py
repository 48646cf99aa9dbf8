"""The site's own randomness: repeatable from a key, never from another stream's use."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from client.randomness import SecureStream


def test_one_key_gives_one_stream_and_two_keys_two() -> None:
    assert SecureStream.from_seed(1, "a").bytes(64) == SecureStream.from_seed(1, "a").bytes(64)
    assert SecureStream.from_seed(1, "a").bytes(64) != SecureStream.from_seed(1, "b").bytes(64)
    assert SecureStream.from_seed(1, "ab", "c").bytes(64) != SecureStream.from_seed(1, "a", "bc").bytes(64)
    assert SecureStream.from_entropy().bytes(64) != SecureStream.from_entropy().bytes(64)


def test_drawing_from_a_stream_does_not_move_its_forks() -> None:
    fresh, used = SecureStream.from_seed(1), SecureStream.from_seed(1)
    used.normal(1000)
    assert fresh.fork("noise").bytes(32) == used.fork("noise").bytes(32)
    assert fresh.fork("noise").bytes(32) != fresh.fork("draw").bytes(32)


def test_normals_are_standard_normal() -> None:
    assert stats.kstest(SecureStream.from_seed(5).normal(20_001), "norm").pvalue > 1e-3


def test_discrete_laplace_has_its_law() -> None:
    """P(k) = tanh(eps/2) exp(-eps |k|).  [Ghosh et al. 2012]"""
    epsilon = 0.7
    draws = SecureStream.from_seed(6).discrete_laplace(40_000, epsilon)
    for k in (-2, 0, 3):
        expected = np.tanh(epsilon / 2) * np.exp(-epsilon * abs(k))
        assert np.mean(draws == k) == pytest.approx(expected, abs=4 * np.sqrt(expected / 40_000))


def test_a_permutation_holds_every_index_once_and_integers_their_range() -> None:
    assert sorted(SecureStream.from_seed(7).permutation(50)) == list(range(50))
    draws = SecureStream.from_seed(8).integers(5000, -1, 2)
    assert set(draws.tolist()) == {-1, 0, 1}


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SecureStream(b"short")
