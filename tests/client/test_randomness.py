"""The site's own randomness: repeatable from a key, never from another stream's use."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from client.gaussian import BoxMuller, normals_on_device
from client.randomness import PAIRS_AT_ONCE, SecureStream

ROOT = Path(__file__).parents[2]


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


def test_the_stream_is_aes_in_counter_mode() -> None:
    """The stream is the encrypted counters 0, 1, ... of 128 bits.  [NIST SP 800-38A, 6.5; the key is that of F.5.5]"""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counters = b"".join(i.to_bytes(16, "big") for i in range(5))
    assert SecureStream(key).bytes(80) == Cipher(AES(key), ECB()).encryptor().update(counters)  # noqa: S305  one block each


def test_normals_are_standard_normal() -> None:
    assert stats.kstest(SecureStream.from_seed(5).normal(20_001), "norm").pvalue > 1e-3


@pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
def test_normals_of_another_deviation_would_be_noticed(wrong: float) -> None:
    """The other side of the test above: it rejects noise that is a third too small or half too large."""
    drawn = np.concatenate([block.copy() for block in SecureStream.from_seed(5).normal_blocks(20_001, deviation=wrong)])
    assert stats.kstest(drawn / wrong, "norm").pvalue > 1e-3
    assert stats.kstest(drawn, "norm").pvalue < 1e-6


def test_normals_fill_bins_of_equal_probability_alike_also_far_out() -> None:
    drawn = SecureStream.from_seed(9).normal(1_000_000)
    counts = np.bincount((stats.norm.cdf(drawn) * 256).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3
    beyond = np.sum(np.abs(drawn) > 4)
    assert stats.poisson.interval(0.999, 2e6 * stats.norm.sf(4))[0] <= beyond
    assert beyond <= stats.poisson.interval(0.999, 2e6 * stats.norm.sf(4))[1]


def test_the_two_normals_of_a_pair_are_independent() -> None:
    n = 2 * PAIRS_AT_ONCE
    drawn = SecureStream.from_seed(10).normal(n).reshape(2, n // 2)
    bins = (stats.norm.cdf(drawn) * 8).astype(int)
    assert stats.chisquare(np.bincount(8 * bins[0] + bins[1], minlength=64)).pvalue > 1e-3
    assert abs(np.corrcoef(drawn**2)[0, 1]) < 4 / np.sqrt(n / 2)


def test_no_two_blocks_repeat_and_a_number_of_normals_comes_whatever_it_is() -> None:
    n = 6 * PAIRS_AT_ONCE + 3
    drawn = SecureStream.from_seed(11).normal(n)
    assert len(np.unique(drawn)) == n
    assert [len(SecureStream.from_seed(0).normal(k)) for k in (0, 1, 2, 3)] == [0, 1, 2, 3]


def words(radius: int, angle: int) -> np.ndarray:
    return np.array([radius, angle], dtype=np.int64)


@pytest.mark.parametrize(
    ("radius", "angle", "expected"),
    [
        (0, 0, (np.sqrt(150 * np.log(2)), 0.0)),  # the smallest uniform, 2**-75
        (2**62, 0, (np.sqrt(2 * np.log(2)), 0.0)),  # one half
        (-(2**62), 0, (-np.sqrt(2 * np.log(2)), 0.0)),  # the other half of the circle
        (2**62, 2**62, (np.sqrt(np.log(2)), np.sqrt(np.log(2)))),  # a quarter of pi
        (2**63 - 1, 0, (0.0, 0.0)),  # one
        (-(2**63), -(2**63), (0.0, 0.0)),
    ],
)
def test_words_become_the_points_that_the_equation_says(radius: int, angle: int, expected: tuple[float, float]) -> None:
    x, y = BoxMuller(1).normals(words(radius, angle), 1.0)
    assert (x, y) == pytest.approx(expected, abs=1e-12)


def test_the_tail_is_followed_to_ten_deviations_in_fine_steps() -> None:
    """A radius of 32 bits would end at 6.7 deviations and be coarse before that."""
    rare = np.array([*range(1, 1001), *[0] * 1000], dtype=np.int64)  # 2**-63 to 2**-53
    radii = BoxMuller(1000).normals(rare, 1.0)[:1000]
    assert 9.2 < radii.max() < 9.4
    assert np.all(np.diff(radii) < 0)
    one, other = (BoxMuller(1).normals(words(0, angle), 1.0)[0] for angle in (0, 2**11 - 1))
    assert one > 10.19
    assert other < 9.36  # the angle's spare bits continue the radius
    assert abs(np.arctan2(*BoxMuller(1).normals(words(0, 2**11 - 1), 1.0)[::-1])) < 1e-14


def test_the_devices_equation_gives_the_same_normals() -> None:
    drawn = np.frombuffer(SecureStream.from_seed(12).bytes(16 * 5000), dtype="<i8").copy()
    drawn[:6] = (0, 1, -1, 2**63 - 1, -(2**63), 2**53)
    there = normals_on_device(torch.from_numpy(drawn.copy()), 1.7).numpy()
    np.testing.assert_allclose(BoxMuller(5000).normals(drawn, 1.7), there, rtol=0, atol=1e-13)
    there = SecureStream.from_seed(3).normal_on(torch.device("cpu"), 1001, deviation=2.0).numpy()
    here = next(SecureStream.from_seed(3).normal_blocks(1001, deviation=2.0))
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-13)


def test_torchs_and_numpys_generators_have_no_part_in_it() -> None:
    torch.manual_seed(1)
    first = SecureStream.from_seed(4).normal(100)
    before = torch.get_rng_state()
    second = SecureStream.from_seed(4).normal(100)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, SecureStream.from_seed(4).normal(100))


def test_a_public_seed_reaches_a_stream_only_behind_the_simulations_setting() -> None:
    """Every function of the product that calls `from_seed` reads `simulation_seed` and asks whether there is one."""
    calling = [
        (path.name, ast.unparse(node), [ast.unparse(part.test) for part in ast.walk(node) if isinstance(part, ast.If)])
        for package in ("client", "common", "server")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and "from_seed(" in ast.unparse(node) and node.name != "from_seed"
    ]
    assert {name for name, _, _ in calling} == {"site.py", "budget.py"}
    for name, text, questions in calling:
        assert "self._settings.simulation_seed" in text, name
        assert any(question.endswith(("seed is None", "seed is not None")) for question in questions), name


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


def test_both_halves_of_the_circle_have_the_same_radii():
    """Words (k, s) and (-1 - k, 2047 - s) are mirror images; a shorter tail on one side would be no Gaussian."""
    radii = np.array([0, 1, 5, 2**40, 2**62, 2**63 - 1], dtype=np.int64)
    angles = np.array([0, 2047, 3, 2**50, 7, -(2**60)], dtype=np.int64)
    mirrored = (angles & ~np.int64(2047)) | (2047 - (angles & 2047))
    right = BoxMuller(6).normals(np.concatenate([radii, angles]), 1.0).copy()
    left = BoxMuller(6).normals(np.concatenate([-1 - radii, mirrored]), 1.0).copy()
    np.testing.assert_allclose(np.hypot(*left.reshape(2, 6)), np.hypot(*right.reshape(2, 6)), rtol=1e-12)
    assert (left[:6] * right[:6] <= 0).all()


def test_a_device_gets_the_normals_of_the_processor_however_many():
    n = 70_001
    there = SecureStream.from_seed(3).normal_on(torch.device("cpu"), n, deviation=2.0)
    here = np.concatenate([b.copy() for b in SecureStream.from_seed(3).normal_blocks(n, deviation=2.0)])
    np.testing.assert_allclose(there.numpy(), here, rtol=1e-10, atol=1e-12)


def test_uniforms_never_reach_the_ends():
    """The largest word must not round to one: an index drawn with it would be out of range."""
    assert ((2**64 - 1) >> 12) + 0.5 < 2.0**52
    assert float(np.float64((2**64 - 1) >> 12) + 0.5) * 2.0**-52 < 1.0
