"""One-run bounds: the table of the field's numbers, the truth never exceeded, and cases that can be worked out by hand.

Sizes of the table: 1000 canaries and fewer, delta 1e-5, five shares, medians. It was computed by other code.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import binom

from common.measure.one_run import (
    GUESS_RULES,
    Guesses,
    GuessRule,
    OneRunBounds,
    add_up,
    claim_free_epsilon,
    claim_free_p_value,
    curve_mu,
    curve_refuted,
    gaussian_accuracy,
    gaussian_epsilon,
    guess,
    one_run_bounds,
)
from common.privacy.accounting import epsilon, gaussian_mu
from common.privacy.mechanism import DpSgd

DELTA = 1e-5
BOTH_ENDS = tuple(GuessRule(into=share / 2, out=share / 2) for share in (0.05, 0.1, 0.2, 0.4, 0.8))
TABLE = {  # signal / noise -> canaries -> claim-free and given the Gaussian curve
    0.5: {100: (0.0, 0.0), 300: (0.42, 0.54), 1000: (0.62, 0.86)},
    1.0: {100: (0.58, 0.96), 300: (1.0, 1.5), 1000: (1.7, 2.5)},
    2.0: {100: (1.8, 3.4), 300: (2.3, 3.7), 1000: (3.1, 4.8)},
    4.0: {100: (2.8, 5.5), 300: (3.9, 7.3), 1000: (5.1, 9.1)},
}
CEILINGS = {100: (2.8, 5.5), 300: (3.9, 7.3), 1000: (5.1, 9.1)}


def gaussian_run(mu: float, canaries: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    inside = rng.random(canaries) < 0.5
    return rng.normal(size=canaries) + mu * inside, inside


def bounds_of(
    scores: NDArray[np.float64], inside: NDArray[np.bool_], rules: tuple[GuessRule, ...] = BOTH_ENDS
) -> OneRunBounds:
    counts = [guess(scores.tolist(), inside.tolist(), rule) for rule in rules]
    return one_run_bounds(len(scores), counts, delta=DELTA, confidence=0.95)


def perfect(canaries: int, rules: tuple[GuessRule, ...]) -> OneRunBounds:
    counts = [Guesses(rule=r, guesses=r.guesses(canaries), correct=r.guesses(canaries)) for r in rules]
    return one_run_bounds(canaries, counts, delta=DELTA, confidence=0.95)


@pytest.mark.parametrize("canaries", [100, 300, 1000])
@pytest.mark.parametrize("mu", list(TABLE))
def test_medians_are_those_of_the_table(mu: float, canaries: int) -> None:
    rng = np.random.default_rng(17)
    runs = [bounds_of(*gaussian_run(mu, canaries, rng)).proven for _ in range(101)]
    medians = np.median([[b.value.value for b in run] for run in runs], axis=0)
    # A run's bound deviates by 0.3 to 0.6 and takes few values; the table's repeats are few. One wrong guess is 0.9 at
    # the top.
    assert medians == pytest.approx(TABLE[mu][canaries], abs=0.45 if mu < 4 else 1.0)


@pytest.mark.parametrize("canaries", list(CEILINGS))
def test_ceilings_are_those_of_the_table(canaries: int) -> None:
    found = perfect(canaries, BOTH_ENDS)
    assert [b.ceiling for b in found.proven] == pytest.approx(CEILINGS[canaries], abs=0.07)
    assert [b.value.value for b in found.all] == [b.ceiling for b in found.all]


def test_the_rules_of_the_audit_lose_no_ceiling() -> None:
    assert [b.ceiling for b in perfect(1200, GUESS_RULES).proven] == [
        b.ceiling for b in perfect(1200, BOTH_ENDS).proven
    ]


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rules", [BOTH_ENDS, GUESS_RULES], ids=["both ends", "of the audit"])
def test_no_proven_bound_exceeds_the_truth_in_more_than_a_twentieth(mu: float, rules: tuple[GuessRule, ...]) -> None:
    rng = np.random.default_rng(3)
    truth = gaussian_epsilon(mu, DELTA)
    runs = [bounds_of(*gaussian_run(mu, 200, rng), rules) for _ in range(200)]
    for bound in ("claim_free", "gaussian_curve", "independent"):
        assert np.mean([getattr(run, bound).value.value > truth for run in runs]) <= 0.05


def test_without_any_signal_hardly_a_run_shows_a_leak() -> None:
    rng = np.random.default_rng(5)
    runs = [bounds_of(*gaussian_run(0.0, 200, rng), GUESS_RULES) for _ in range(300)]
    for bound in ("claim_free", "gaussian_curve", "independent"):
        assert np.mean([getattr(run, bound).value.value > 0 for run in runs]) <= 0.07  # 0.05 and its sampling error


def test_randomised_response_is_approached_and_not_exceeded() -> None:
    """Truthful with probability logistic(epsilon): the worst case of the claim-free theorem."""
    rng, truth, canaries = np.random.default_rng(7), 1.5, 4000
    rule = GuessRule(into=0.4, out=0.4)
    found = []
    for _ in range(100):
        inside = rng.random(canaries) < 0.5
        answers = np.where(rng.random(canaries) < 1 / (1 + math.exp(-truth)), inside, ~inside)
        scores = answers + 1e-6 * rng.random(canaries)  # ties in random order
        counted = guess(scores.tolist(), inside.tolist(), rule)
        found.append(claim_free_epsilon(canaries, counted.guesses, counted.correct, delta=1e-12, error=0.05))
    assert np.mean(np.array(found) > truth) <= 0.05
    assert np.median(found) > 0.9 * truth


def test_a_ceiling_stops_what_canaries_can_refute() -> None:
    """About ln(m / ln(1 / alpha)): a hundred canaries can never falsify a claim of epsilon 3 without its curve."""
    assert perfect(100, GUESS_RULES).claim_free.ceiling < 3.0
    assert perfect(400, GUESS_RULES).gaussian_curve.ceiling > 7.5  # what the default of a study is chosen for
    assert perfect(1200, GUESS_RULES).gaussian_curve.ceiling > 9.0


def test_the_claim_free_p_value_is_the_theorem_term_by_term() -> None:
    m, r, v, eps, delta = 40, 12, 9, 0.7, 1e-3
    p = 1 / (1 + math.exp(-eps))
    probability = [float(binom.pmf(k, r, p)) for k in range(r + 1)]
    beta = sum(probability[v:])
    slack = max(sum(probability[v - i : v]) / i for i in range(1, v + 1))
    assert claim_free_p_value(m, r, v, epsilon=eps, delta=delta) == pytest.approx(beta + 2 * m * delta * slack)


def test_a_larger_delta_weakens_the_claim_free_bound() -> None:
    counts = [Guesses(rule=BOTH_ENDS[-1], guesses=160, correct=140)]
    strict, loose = (one_run_bounds(200, counts, delta=d, confidence=0.95).claim_free for d in (1e-9, 1e-3))
    assert loose.value.value < strict.value.value


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_one_guess_about_one_canary_is_right_with_the_probability_of_the_gaussian_test(mu: float) -> None:
    best = float(ndtr(mu / 2))
    assert curve_refuted(1, 1, 1, mu=mu, error=best + 1e-9)
    assert not curve_refuted(1, 1, 1, mu=mu, error=best - 1e-9)


def test_more_right_guesses_refute_more() -> None:
    found = [curve_mu(200, 100, right, error=0.05) for right in range(50, 101, 10)]
    assert found == sorted(found)
    assert found[0] == 0.0
    assert found[-1] > 1.0


@pytest.mark.parametrize("rule", [*GUESS_RULES, *BOTH_ENDS], ids=str)
def test_the_expected_accuracy_is_what_simulated_guesses_have(rule: GuessRule) -> None:
    scores, inside = gaussian_run(1.3, 200_000, np.random.default_rng(1))
    counted = guess(scores.tolist(), inside.tolist(), rule)
    assert counted.correct / counted.guesses == pytest.approx(gaussian_accuracy(1.3, rule), abs=0.01)


@pytest.mark.parametrize(
    ("noise", "probability", "steps", "delta"),
    [
        (0.99, 0.1, 96, 1e-4),
        (1.0, 0.01, 1000, 1e-5),
        (0.7, 0.01, 1000, 1e-5),
        (3.0, 0.25, 8, 1e-4),
        (0.5, 1e-3, 100, 1e-5),
    ],
)
def test_the_gaussian_curve_through_a_claim_covers_the_accountants_curve(
    noise: float, probability: float, steps: int, delta: float
) -> None:
    """Else a faithful training could break the hypothesis that its claim is tested by."""

    training = DpSgd(noise_multiplier=noise, sampling_probability=probability, steps=steps)
    mu = gaussian_mu(epsilon([training], delta).upper, delta)
    for looser in (10 * delta, 1e-3, 1e-2, 5e-2, 0.2):
        if looser > delta:
            # 0.01 is the accountant's own error, on either side.
            assert epsilon([training], looser).upper <= gaussian_epsilon(mu, looser) + 0.01


def test_guesses_are_the_ends_and_ties_know_nothing_of_the_coins() -> None:
    rule = GuessRule(into=0.2, out=0.4)
    found = guess([5.0, 1.0, 4.0, 2.0, 3.0], [True, False, False, True, True], rule)
    assert (found.guesses, found.correct) == (3, 2)  # 0 in: right; 1 out: right; 3 out: wrong
    alike = [guess([0.0] * 10, [i in inside for i in range(10)], rule).correct for inside in ({0, 1}, {8, 9})]
    assert alike == [2, 6]  # always the same places, whatever the coins


def test_guesses_of_sites_add_up_rule_by_rule() -> None:
    one = [Guesses(rule=rule, guesses=10, correct=6) for rule in GUESS_RULES]
    other = [Guesses(rule=rule, guesses=20, correct=11) for rule in GUESS_RULES]
    assert add_up([one, other]) == tuple(Guesses(rule=rule, guesses=30, correct=17) for rule in GUESS_RULES)
    with pytest.raises(ValueError, match="different rules"):
        add_up([one, other[:-1]])


def test_a_rule_that_guesses_nobody_proves_nothing() -> None:
    found = one_run_bounds(10, [Guesses(rule=GUESS_RULES[0], guesses=0, correct=0)], delta=DELTA, confidence=0.95)
    assert [b.ceiling for b in found.all] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("into", "out"), [(0.0, 0.0), (0.6, 0.1), (-0.1, 0.2), (0.1, math.nan)])
def test_a_rule_that_cannot_be_is_refused(into: float, out: float) -> None:
    with pytest.raises(ValueError, match="share of guesses"):
        GuessRule(into=into, out=out)


def test_more_right_than_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="11 right of 10"):
        Guesses(rule=GUESS_RULES[0], guesses=10, correct=11)
    with pytest.raises(ValueError, match="at most 5 guesses"):
        one_run_bounds(5, [Guesses(rule=GUESS_RULES[0], guesses=6, correct=6)], delta=DELTA, confidence=0.95)
