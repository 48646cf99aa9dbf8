"""Known answers: audit notes K1 (normal scores), K2 (copies), K8 (site shift), and coverage with privacy noise."""

import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from common.measure.intervals import Side
from common.measure.membership import (
    Stratum,
    copied_at_least,
    copied_at_most,
    copies_lower_bound,
    copies_upper_bound,
    exceedance,
    far_edges,
    fitted_roc,
    rate_difference,
    set_membership_p_value,
    shared_level,
    smallest_detectable_copies,
    stratified_auc,
    true_positives,
)
from common.measure.noised_counts import EXACT, discrete_laplace_noise

EDGES = np.array([*np.linspace(-3, 3, 25), 4.0, 6.0])
FINE = np.linspace(-4, 9, 199)


def laplace(rng, size, epsilon):
    p = 1 - math.exp(-epsilon)
    return rng.geometric(p, size) - rng.geometric(p, size)


def stratum(rng, members, nonmembers, epsilon=None, edges=EDGES):
    counts = [np.histogram(x, [-np.inf, *edges, np.inf])[0].astype(float) for x in (members, nonmembers)]
    if epsilon is None:
        return Stratum(members=counts[0], nonmembers=counts[1], member_noise=EXACT, nonmember_noise=EXACT)
    noise = discrete_laplace_noise(epsilon)
    noised = [c + laplace(rng, len(c), epsilon) for c in counts]
    return Stratum(members=noised[0], nonmembers=noised[1], member_noise=noise, nonmember_noise=noise)


def test_auc_of_shifted_normals_is_phi_of_mu_over_root_two():
    rng = np.random.default_rng(1)
    auc = stratified_auc([stratum(rng, rng.normal(0.5, 1, 40_000), rng.normal(0, 1, 40_000))])
    assert auc.value == pytest.approx(norm.cdf(0.5 / math.sqrt(2)), abs=0.008)


def test_reversed_scores_give_the_mirrored_auc_and_equal_scores_one_half():
    rng = np.random.default_rng(2)
    high, low = rng.normal(1, 1, 5000), rng.normal(0, 1, 5000)
    forward, backward = (stratified_auc([stratum(rng, *pair)]).value for pair in ((high, low), (low, high)))
    assert forward + backward == pytest.approx(1.0, abs=1e-12)
    assert stratified_auc([stratum(rng, np.zeros(50), np.zeros(70))]).value == pytest.approx(0.5)


def test_one_patient_a_side_has_an_interval_as_wide_as_the_question():
    rng = np.random.default_rng(3)
    interval = stratified_auc([stratum(rng, np.array([5.0]), np.array([-5.0]))]).interval(0.95)
    assert interval.estimate == 1.0
    assert interval.low < 0.5


def test_an_empty_group_or_a_nan_count_is_refused():
    full, empty = np.ones(28), np.zeros(28)
    for members, nonmembers in ((full, empty), (empty, full), (full, np.full(28, np.nan))):
        with pytest.raises(ValueError, match=r"empty|finite"):
            Stratum(members=members, nonmembers=nonmembers, member_noise=EXACT, nonmember_noise=EXACT)


@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_auc_interval_covers_the_truth_with_privacy_noise_and_would_not_without_counting_it(epsilon):
    rng, mu, truth = np.random.default_rng(4), 0.3, norm.cdf(0.3 / math.sqrt(2))
    covered, naive = [], []
    for _ in range(250):
        s = stratum(rng, rng.normal(mu, 1, 100), rng.normal(0, 1, 80), epsilon)
        deaf = Stratum(members=s.members, nonmembers=s.nonmembers, member_noise=EXACT, nonmember_noise=EXACT)
        covered.append(stratified_auc([s]).interval(0.95).contains(truth))
        naive.append(stratified_auc([deaf]).interval(0.95).contains(truth))
    assert np.mean(covered) >= 0.93
    assert np.mean(naive) < np.mean(covered)


def test_a_site_that_scores_higher_does_not_pass_for_membership():
    rng = np.random.default_rng(5)
    # Site one: high scores and mostly members. Pooled raw scores would separate the groups; nobody leaks.
    members = [rng.normal(2, 1, 900), rng.normal(-2, 1, 300)]
    nonmembers = [rng.normal(2, 1, 300), rng.normal(-2, 1, 900)]
    pooled = stratified_auc([stratum(rng, np.concatenate(members), np.concatenate(nonmembers))])
    kept_apart = [stratum(rng, m, n) for m, n in zip(members, nonmembers, strict=True)]
    assert pooled.value > 0.7
    assert stratified_auc(kept_apart).interval(0.99).contains(0.5)
    assert true_positives(kept_apart, 0.01, 0.95).upper.value < 0.06
    assert copies_lower_bound(kept_apart, 0.01, 0.99).value <= 0


def test_copies_of_a_share_f_give_auc_half_plus_f_over_two_and_tpr_alpha_plus_f():
    rng, f = np.random.default_rng(6), 0.1
    scores = rng.normal(0, 1, 30_000)
    members = np.where(rng.random(30_000) < f, 8.0, scores)
    s = stratum(rng, members, rng.normal(0, 1, 30_000))
    assert stratified_auc([s]).value == pytest.approx(0.5 + f / 2, abs=0.01)
    assert true_positives([s], 0.01, 0.95).interval.estimate == pytest.approx(0.01 + 0.99 * f, abs=0.01)
    last = exceedance([s], len(EDGES) - 1)
    assert copied_at_least(last, 0.95) < f < copied_at_most(last, 0.95)
    assert copied_at_most(last, 0.95) - copied_at_least(last, 0.95) < 0.01


@pytest.mark.parametrize(("shift", "copies"), [(0.0, 0.0), (0.0, 0.05), (0.5, 0.0)])
def test_tpr_bounds_hold_on_both_sides_with_privacy_noise(shift, copies):
    rng, n, alpha = np.random.default_rng(7), 500, 0.01
    truth = copies + (1 - copies) * norm.cdf(shift + norm.ppf(alpha))
    upper, lower = [], []
    for _ in range(120):
        strata = []
        for _site in range(3):
            members = rng.normal(shift, 1, n)
            members = np.where(rng.random(n) < copies, 8.0, members)
            strata.append(stratum(rng, members, rng.normal(0, 1, 280), 1.0))
        found = true_positives(strata, alpha, 0.95)
        assert found.lower.side is Side.LOWER
        assert found.upper.side is Side.UPPER
        upper.append(found.upper.value >= truth)
        lower.append(found.lower.value <= truth)
    assert np.mean(upper) >= 0.93
    assert np.mean(lower) >= 0.93


def test_copies_bound_rarely_alarms_without_a_leak_and_nearly_always_with_five_percent():
    rng, alarms, found = np.random.default_rng(8), [], []
    grid = np.array([*np.linspace(-2.5, 2.5, 11), 3.3, 4.0, 5.5])
    for _ in range(120):
        for copies, log in ((0.0, alarms), (0.05, found)):
            strata = []
            for _site in range(3):
                members = rng.normal(0, 1, 520)
                members = np.where(rng.random(520) < copies, rng.normal(6.5, 2, 520), members)
                strata.append(stratum(rng, members, rng.normal(0, 1, 280), 1.0, grid))
            log.append(copies_lower_bound(strata, 0.01, 0.99).value > 0)
    assert np.mean(alarms) <= 0.03
    assert np.mean(found) >= 0.95


def test_negative_counts_are_kept_because_clipping_them_would_invent_patients():
    rng = np.random.default_rng(9)
    tails = []
    for _ in range(1500):
        s = stratum(rng, np.zeros(200), np.zeros(200), 0.5)  # nobody scores above the middle
        tails.append(exceedance([s], 18).members.value)
    assert np.mean(tails) == pytest.approx(0.0, abs=4 * np.std(tails) / math.sqrt(len(tails)))
    assert min(tails) < 0


def test_the_curve_that_is_shown_is_possible_whatever_the_noise():
    rng = np.random.default_rng(10)
    for _ in range(50):
        points = fitted_roc([stratum(rng, rng.normal(0, 1, 200), rng.normal(0, 1, 150), 0.5) for _site in range(3)])
        assert points.shape == (len(EDGES) + 2, 2)
        assert (np.diff(points, axis=0) >= 0).all()
        assert points[0] == pytest.approx([0, 0])
        assert points[-1] == pytest.approx([1, 1])


def test_limits_without_any_exceedance_are_as_wide_as_the_rule_of_three():
    nobody = stratum(np.random.default_rng(0), np.zeros(300), np.zeros(300))
    at = exceedance([nobody], len(EDGES) - 1)
    assert copied_at_most(at, 0.95) == pytest.approx(3 / 300, rel=0.02)
    assert copied_at_least(at, 0.95) == pytest.approx(-3 / 300, rel=0.02)
    assert rate_difference(at, 0.95).estimate == 0


def test_hundreds_of_edges_are_thinned_to_a_few_that_reach_from_three_times_the_rate_to_no_nonmember():
    rng = np.random.default_rng(11)
    s = stratum(rng, rng.normal(0, 1, 900), rng.normal(0, 1, 800), edges=FINE)
    tried = [at.nonmembers.value for at in far_edges([s], 0.01)]
    assert 3 <= len(tried) <= 5
    assert tried[0] <= 0.03
    assert tried[-1] == 0
    assert tried == sorted(set(tried), reverse=True)


def test_far_edges_of_noised_fine_grids_are_few_and_end():
    rng = np.random.default_rng(12)
    s = stratum(rng, rng.normal(0, 1, 900), rng.normal(0, 1, 800), 0.3, edges=FINE)
    assert 1 <= len(far_edges([s], 0.01)) <= 16


def test_exact_counts_on_a_fine_grid_find_five_percent_of_copies_and_do_not_invent_any():
    rng, alarms, found = np.random.default_rng(13), [], []
    for _ in range(150):
        for copies, log in ((0.0, alarms), (0.05, found)):
            members = np.where(rng.random(200) < copies, 8.0, rng.normal(0, 1, 200))
            s = stratum(rng, members, rng.normal(0, 1, 200), edges=FINE)
            log.append(copies_lower_bound([s], 0.01, 0.99).value > 0)
    assert np.mean(alarms) <= 0.03  # 0.005 over 2,000 repeats; normal limits over all edges alarmed in 0.09
    assert np.mean(found) >= 0.78


def test_everybody_above_or_nobody_above_divides_by_nothing():
    rng = np.random.default_rng(14)
    for members, nonmembers in ((np.full(5, 9.0), np.full(3, -9.0)), (np.full(5, -9.0), np.full(3, 9.0)), ([1.0], [1])):
        s = stratum(rng, np.asarray(members), np.asarray(nonmembers), edges=FINE)
        found = true_positives([s], 0.01, 0.95)
        assert found.lower.value <= found.interval.estimate <= found.upper.value
        assert math.isfinite(copies_lower_bound([s], 0.01, 0.99).value)
        assert math.isfinite(copies_upper_bound([s], 0.01, 0.95).value)
        assert 0 <= set_membership_p_value(s) <= 1
        assert 0 < smallest_detectable_copies(found.beyond, 0.99, 0.9) <= 1


@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_the_smallest_detectable_share_is_detected_as_often_as_stated(epsilon):
    rng, edge, probability = np.random.default_rng(15), 25, 0.9
    blank = [stratum(rng, rng.normal(0, 1, 500), norm.ppf(np.linspace(0.002, 0.998, 500)), epsilon)]
    smallest = smallest_detectable_copies(exceedance(blank, edge), shared_level(0.99, 3), probability)
    found = []
    for _ in range(400):
        members = np.where(rng.random(500) < smallest, 8.0, rng.normal(0, 1, 500))
        at = exceedance([stratum(rng, members, rng.normal(0, 1, 500), epsilon)], edge)
        found.append(copied_at_least(at, shared_level(0.99, 3)) > 0)
    assert np.mean(found) == pytest.approx(probability, abs=0.08)


def test_a_set_that_scores_higher_has_a_small_p_value_and_its_mirror_a_large_one():
    rng = np.random.default_rng(16)
    high, low = rng.normal(0.5, 1, 300), rng.normal(0, 1, 200)
    assert set_membership_p_value(stratum(rng, high, low, 1.0)) < 0.001
    assert set_membership_p_value(stratum(rng, low, high, 1.0)) > 0.999


def test_the_set_p_value_is_that_of_the_rank_sum_test_without_noise():
    rng = np.random.default_rng(17)
    high, low = rng.normal(0.2, 1, 150), rng.normal(0, 1, 120)
    every = np.sort(np.concatenate([high, low]))
    s = stratum(rng, high, low, edges=(every[1:] + every[:-1]) / 2)
    expected = mannwhitneyu(high, low, alternative="greater", method="asymptotic", use_continuity=False).pvalue
    assert set_membership_p_value(s) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("epsilon", "members", "nonmembers"), [(0.5, 200, 120), (1.0, 400, 200), (None, 30, 300)])
def test_set_p_values_are_small_no_oftener_than_they_say(epsilon, members, nonmembers):
    rng = np.random.default_rng(18)
    p = np.array(
        [
            set_membership_p_value(stratum(rng, rng.normal(0, 1, members), rng.normal(0, 1, nonmembers), epsilon))
            for _ in range(2000)
        ]
    )
    assert np.mean(p < 0.05) <= 0.062  # two and a half standard errors
    assert np.mean(p < 0.01) <= 0.016
    assert np.mean(p < 0.05) >= 0.03
