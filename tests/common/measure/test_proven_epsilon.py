"""Known answers: randomised response and Laplace scores, whose epsilon is exact (K3), and the Gaussian mechanism."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from common.measure.membership import Exceedance, Stratum, exceedance, true_positives
from common.measure.noised_counts import EXACT, Share, discrete_laplace_noise
from common.measure.proven_epsilon import (
    clopper_pearson_epsilon,
    epsilon_of_errors,
    gaussian_curve_epsilon,
    gaussian_mu_of_errors,
)


def seen(true: int, members: int, false: int, nonmembers: int) -> Exceedance:
    return Exceedance(
        members=Share(value=true / members, draws=members, noise=EXACT),
        nonmembers=Share(value=false / nonmembers, draws=nonmembers, noise=EXACT),
    )


def randomised_response(rng, epsilon: float, n: int, audit: float | None) -> list[Stratum]:
    """Two bins; members say yes with probability logistic(epsilon), non-members no. Three unequal sites."""
    truthful = 1 / (1 + math.exp(-epsilon))
    strata = []
    for size in (n // 2, n, 2 * n):
        groups = [rng.binomial(size, p) for p in (truthful, 1 - truthful)]
        noise = EXACT if audit is None else discrete_laplace_noise(audit)
        counts = [np.array([size - k, k], dtype=float) for k in groups]
        if audit is not None:
            q = 1 - math.exp(-audit)
            counts = [c + rng.geometric(q, 2) - rng.geometric(q, 2) for c in counts]
        strata.append(Stratum(members=counts[0], nonmembers=counts[1], member_noise=noise, nonmember_noise=noise))
    return strata


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("audit", [None, 0.5])
def test_the_bound_stays_below_a_known_epsilon_and_approaches_it(epsilon, audit):
    rng = np.random.default_rng(0)

    def bounds(n: int, repeats: int) -> np.ndarray:
        strata = (randomised_response(rng, epsilon, n, audit) for _ in range(repeats))
        found = [clopper_pearson_epsilon([exceedance(s, 0)], delta=0.0, confidence=0.95) for s in strata]
        assert all(b.value.value <= b.ceiling for b in found)
        return np.array([b.value.value for b in found])

    assert np.mean(bounds(150, 300) <= epsilon) >= 0.95
    assert np.median(bounds(30_000, 25)) == pytest.approx(epsilon, rel=0.1)


@pytest.mark.parametrize("audit", [None, 1.0])
def test_an_edge_that_the_nonmembers_chose_proves_no_more_than_is_true(audit):
    """Laplace scores a distance epsilon apart: TPR / FPR is e^epsilon at every edge of the tail."""
    rng, epsilon, edges = np.random.default_rng(1), 2.0, np.array([*range(-3, 4), 4.5, 6.0, 8.0])
    noise = EXACT if audit is None else discrete_laplace_noise(audit)
    held, values = [], []
    for _ in range(150):
        groups = []
        for shift, n in ((epsilon, 1500), (0.0, 800)):
            counts = np.histogram(rng.laplace(shift, 1, n), [-np.inf, *edges, np.inf])[0].astype(float)
            if audit is not None:
                q = 1 - math.exp(-audit)
                counts += rng.geometric(q, len(counts)) - rng.geometric(q, len(counts))
            groups.append(counts)
        s = Stratum(members=groups[0], nonmembers=groups[1], member_noise=noise, nonmember_noise=noise)
        at = true_positives([s], 0.01, 0.95).beyond
        values.append(clopper_pearson_epsilon([at], delta=0.0, confidence=0.95).value.value)
        held.append(values[-1] <= epsilon)
    assert np.mean(held) >= 0.95
    assert np.median(values) > 0.25 * epsilon


def test_the_best_of_many_thresholds_is_paid_for():
    rng, alarms = np.random.default_rng(2), []
    for _ in range(500):
        scores = np.sort(rng.normal(size=(2, 150)))
        at = [seen(int((scores[0] > t).sum()), 150, int((scores[1] > t).sum()), 150) for t in np.linspace(-2, 2, 9)]
        alarms.append(clopper_pearson_epsilon(at, delta=0.0, confidence=0.95).value.value > 0)
    assert np.mean(alarms) <= 0.05
    one, many = (clopper_pearson_epsilon([seen(90, 100, 2, 100)] * k, delta=0.0, confidence=0.95) for k in (1, 9))
    assert many.value.value < one.value.value
    assert many.ceiling < one.ceiling


def test_the_ceiling_is_what_a_perfect_attack_of_this_size_gives():
    imperfect = clopper_pearson_epsilon([seen(70, 100, 4, 200)], delta=0.0, confidence=0.95)
    perfect = clopper_pearson_epsilon([seen(100, 100, 0, 200)], delta=0.0, confidence=0.95)
    assert imperfect.ceiling == perfect.ceiling == perfect.value.value > imperfect.value.value
    # Both limits at 2.5 %: no false alarm of 200 leaves an FPR of 1.83 %, no miss of 100 an FNR of 3.62 %.
    assert perfect.ceiling == pytest.approx(math.log((1 - 0.03622) / 0.01828), abs=0.002)


def test_noise_lowers_the_ceiling_and_a_lucky_noise_cannot_exceed_it():
    quiet = discrete_laplace_noise(1.0, 4)
    lucky = Exceedance(
        members=Share(value=1.04, draws=200, noise=quiet.scaled(1 / 200)),
        nonmembers=Share(value=-0.05, draws=200, noise=quiet.scaled(1 / 200)),
    )
    bound = clopper_pearson_epsilon([lucky], delta=0.0, confidence=0.95)
    assert bound.value.value == pytest.approx(bound.ceiling)
    assert bound.ceiling < clopper_pearson_epsilon([seen(200, 200, 0, 200)], delta=0.0, confidence=0.95).ceiling


def test_a_reversed_attack_proves_nothing_and_members_that_are_all_above_prove_it_through_their_misses():
    assert clopper_pearson_epsilon([seen(2, 100, 60, 100)], delta=0.0, confidence=0.95).value.value == 0
    mirror = clopper_pearson_epsilon([seen(3000, 3000, 1500, 3000)], delta=0.0, confidence=0.95)
    assert mirror.value.value == pytest.approx(math.log((1 - 0.518) / (3.69 / 3000)), abs=0.01)


def test_errors_at_the_privacy_limit_give_epsilon_back():
    epsilon, delta, fpr = 1.7, 1e-3, 0.02
    fnr = 1 - math.exp(epsilon) * fpr - delta
    assert epsilon_of_errors(fpr, fnr, delta) == pytest.approx(epsilon)
    assert epsilon_of_errors(fnr, fpr, delta) == pytest.approx(epsilon)
    assert epsilon_of_errors(0.5, 0.6, 0.0) == 0


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_the_gaussian_bound_stays_below_the_mechanism_and_sees_more_than_the_claim_free_one(mu):
    rng, n, delta = np.random.default_rng(3), 2000, 1e-5
    truth = gaussian_curve_epsilon([seen(10**7, 10**7, 0, 10**7)], delta=delta, confidence=0.95).ceiling
    exact = {0.5: 2.0, 1.0: 4.4, 2.0: 10.0}[mu]  # audit notes, section 8
    held, free, curve = [], [], []
    for _ in range(300):
        at = [seen(rng.binomial(n, norm.cdf(mu - t)), n, rng.binomial(n, norm.cdf(-t)), n) for t in (mu / 2,)]
        curve.append(gaussian_curve_epsilon(at, delta=delta, confidence=0.95).value.value)
        free.append(clopper_pearson_epsilon(at, delta=delta, confidence=0.95).value.value)
        held.append(curve[-1] <= exact + 0.05)
    assert np.mean(held) >= 0.95
    assert 0.7 * exact < np.median(curve) < truth
    assert np.median(free) < np.median(curve)


def test_gaussian_errors_give_mu_back():
    assert gaussian_mu_of_errors(float(norm.cdf(-1.3)), float(norm.cdf(1.3 - 2.0))) == pytest.approx(2.0)
    assert gaussian_mu_of_errors(0.5, 0.6) == 0
    assert gaussian_mu_of_errors(1.0, 0.1) == 0


def test_no_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        clopper_pearson_epsilon([], delta=0.0, confidence=0.95)
