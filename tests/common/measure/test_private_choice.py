"""Privacy of the choice is computed, not drawn: every order and every coin of `permute_and_flip`, weighted."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import chisquare

from common.measure.course import CheckpointRule, CoursePoint
from common.measure.intervals import Interval
from common.measure.private_choice import NoisyMax, choose_privately, flip, permute_and_flip

EPSILON = 1.0
SENSITIVITY = 2
GRID = tuple(itertools.product(range(6), repeat=3))  # all scores of three candidates
ANY_STEP = tuple(itertools.product(range(-SENSITIVITY, SENSITIVITY + 1), repeat=3))
STEP_UP = tuple(itertools.product(range(SENSITIVITY + 1), repeat=3))


class NumpyCoins:
    """The interface of a site's stream, seeded."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def bernoulli(self, n: int, probability: float) -> np.ndarray:
        return self.rng.random(n) < probability

    def permutation(self, n: int) -> np.ndarray:
        return self.rng.permutation(n)


class ScriptedCoins:
    """Gives one stated order and one stated fate of each coin; knows how likely they were."""

    def __init__(self, order: Sequence[int], fates: Sequence[bool]) -> None:
        self.order, self.fates, self.likelihood = order, list(fates), 1.0

    def permutation(self, n: int) -> np.ndarray:
        return np.array(self.order)

    def bernoulli(self, n: int, probability: float) -> np.ndarray:
        if probability == 1.0:
            return np.array([True])
        if not self.fates:
            raise MoreCoinsNeeded
        fate = self.fates.pop(0)
        self.likelihood *= probability if fate else 1.0 - probability
        return np.array([fate])


class MoreCoinsNeeded(Exception):
    pass


def law(scores: Sequence[int], mechanism: NoisyMax) -> np.ndarray:
    """(n,) probability of each output: the function is run on every order and every sequence of coins."""
    out = np.zeros(len(scores))
    orders = list(itertools.permutations(range(len(scores))))
    for order in orders:
        open_ends: list[tuple[bool, ...]] = [()]
        while open_ends:
            fates = open_ends.pop()
            coins = ScriptedCoins(order, fates)
            try:
                index = permute_and_flip(scores, mechanism, coins)
            except MoreCoinsNeeded:
                open_ends += [(*fates, True), (*fates, False)]
            else:
                out[index] += coins.likelihood / len(orders)
    return out


def worst_loss(mechanism: NoisyMax, steps: Sequence[tuple[int, ...]]) -> float:
    """Largest log ratio of an output's probabilities over neighbouring scores of the grid."""
    laws = {scores: law(scores, mechanism) for scores in GRID}
    worst = 0.0
    for scores, step in itertools.product(GRID, steps):
        other = tuple(s + d for s, d in zip(scores, step, strict=True))
        if other in laws:
            worst = max(worst, float(np.abs(np.log(laws[scores] / laws[other])).max()))
    return worst


def mechanism(*, epsilon: float = EPSILON, monotone: bool = False) -> NoisyMax:
    return NoisyMax(epsilon=epsilon, sensitivity=SENSITIVITY, monotone=monotone)


@pytest.mark.parametrize(("monotone", "steps"), [(False, ANY_STEP), (True, STEP_UP)])
def test_no_output_is_more_than_e_to_the_epsilon_likelier_for_a_neighbour_and_half_the_noise_breaks_it(monotone, steps):
    assert worst_loss(mechanism(monotone=monotone), steps) <= EPSILON + 1e-9
    assert worst_loss(mechanism(epsilon=2 * EPSILON, monotone=monotone), steps) > 1.3 * EPSILON


def test_scores_that_are_not_monotone_need_twice_the_noise():
    assert worst_loss(mechanism(monotone=True), ANY_STEP) > 1.3 * EPSILON


def test_it_is_the_law_of_the_largest_score_with_exponential_noise():
    scores, m = (5, 3, 0), mechanism()
    rng = np.random.default_rng(0)
    noised = np.array(scores) + rng.exponential(1 / m.rate, (200_000, 3))
    assert law(scores, m) == pytest.approx(np.bincount(noised.argmax(axis=1), minlength=3) / 200_000, abs=0.005)


def test_draws_follow_the_exact_law():
    scores, m, coins = (9, 4, 8, 0), mechanism(), NumpyCoins(1)
    drawn = np.bincount([permute_and_flip(scores, m, coins) for _ in range(20_000)], minlength=4)
    assert chisquare(drawn, law(scores, m) * 20_000).pvalue > 0.001


def test_ties_are_equally_likely_and_better_scores_likelier():
    assert law((3, 3, 3), mechanism()) == pytest.approx(np.full(3, 1 / 3))
    found = law((1, 2, 4), mechanism())
    assert found[0] < found[1] < found[2]
    assert law((20, 0), mechanism(epsilon=20.0))[0] == pytest.approx(1.0)


def test_it_is_never_worse_than_the_exponential_mechanism():
    m = mechanism()
    for scores in GRID:
        weights = np.exp(m.rate * np.array(scores))
        assert law(scores, m) @ scores >= weights / weights.sum() @ scores - 1e-12


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.5])
def test_a_flip_comes_up_as_often_as_it_should(gamma):
    coins = NumpyCoins(0)
    heads = np.mean([flip(gamma, coins) for _ in range(20_000)])
    assert heads == pytest.approx(math.exp(-gamma), abs=0.012)


def test_a_very_bad_candidate_is_rare_but_never_impossible():
    """One coin of 52 bits could never show exp(-100)."""
    coins = ScriptedCoins((0,), [True] * 100)
    assert flip(100.0, coins)
    assert coins.likelihood == pytest.approx(math.exp(-100.0))


def points(auc_limits: Sequence[float], *, exact: bool = False) -> list[CoursePoint]:
    return [
        CoursePoint(
            round=10 * i,
            epsilon_spent=4.0,
            fidelity=None,
            utility=Interval(low=0.0, estimate=0.5, high=1.0, confidence=0.95),
            generator_attack=Interval(low=0.4, estimate=0.5, high=high, confidence=0.95),
            critic_attack=None,
            exact=exact,
        )
        for i, high in enumerate(auc_limits)
    ]


RULE = CheckpointRule(max_auc=0.6, max_epsilon=8.0)


def test_only_allowed_checkpoints_are_drawn_and_no_score_is_told():
    m = mechanism(epsilon=0.01)
    chosen = {
        choose_privately(points([0.7, 0.55, 0.6, 0.8]), [777_777] * 4, RULE, m, NumpyCoins(s)).index for s in range(40)
    }
    assert chosen == {1, 2}
    choice = choose_privately(points([0.7, 0.55]), [777_777, 555_555], RULE, m, NumpyCoins(0))
    assert choice.index == 1
    assert "epsilon 0.01" in choice.reason
    assert not any(digits in choice.reason for digits in ("777", "555"))


def test_nothing_allowed_is_no_choice_with_the_reason():
    choice = choose_privately(points([0.7, 0.8]), [1, 2], RULE, mechanism(), NumpyCoins(0))
    assert choice.index is None
    assert "2 have an AUC limit above 0.6" in choice.reason


def test_exact_points_other_numbers_of_scores_and_impossible_mechanisms_are_refused():
    with pytest.raises(ValueError, match="exact"):
        choose_privately(points([0.5], exact=True), [1], RULE, mechanism(), NumpyCoins(0))
    with pytest.raises(ValueError, match="2 checkpoints have 1 scores"):
        choose_privately(points([0.5, 0.5]), [1], RULE, mechanism(), NumpyCoins(0))
    with pytest.raises(ValueError, match="nothing to choose"):
        permute_and_flip([], mechanism(), NumpyCoins(0))
    with pytest.raises(ValueError, match="epsilon"):
        mechanism(epsilon=0.0)
    with pytest.raises(ValueError, match="sensitivity"):
        NoisyMax(epsilon=1.0, sensitivity=0, monotone=False)
