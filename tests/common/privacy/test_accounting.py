import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from common.privacy.accounting import Epsilon, epsilon, epsilon_rdp, gaussian_log_delta, gaussian_mu
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, NoisedCounts, Unit


def sgd(noise, probability, steps, unit=Unit.PATIENT):
    return DpSgd(noise_multiplier=noise, sampling_probability=probability, steps=steps, unit=unit)


def release(noise):
    return GaussianRelease(noise_multiplier=noise)


def oracle(delta, *rows, releases=(), counts=()):
    """Google's privacy loss distributions: shares no code with Opacus."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=5e-4)
    for noise, probability, steps in rows:
        step = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(step, steps)
    for noise in releases:
        accountant.compose(dp_accounting.GaussianDpEvent(noise))
    for pure in counts:
        accountant.compose(dp_accounting.LaplaceDpEvent(1 / pure))
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(
    ("delta", "rows"),
    [
        (1e-4, [(1.1, 0.05, 200)]),
        (2.9e-3, [(2.78, 0.08, 5000)]),
        (1.4e-2, [(20.3, 0.16, 5000)]),
        (1e-4, [(5.0, 1.0, 100)]),  # every patient in every step
        (1e-2, [(0.8, 0.3, 1)]),
        (1e-5, [(1.0, 0.1, 100), (2.0, 0.05, 200), (1.5, 0.2, 10)]),  # three studies
        (1e-4, [(3.0, 0.5, 100), (20.0, 1.0, 200)]),  # sampled and full together
    ],
)
def test_an_independent_accountant_finds_an_epsilon_inside_the_stated_bounds(delta, rows):
    found = epsilon([sgd(*row) for row in rows], delta)
    truth = oracle(delta, *rows)
    slack = 1e-3 if found.accountant == "gaussian" else 0.0  # there our answer is exact and the oracle's is not
    assert found.lower - slack <= truth <= found.upper + slack
    assert found.upper > found.value + 0.005 or found.accountant == "gaussian"
    assert found.upper - found.lower <= 0.025
    assert found.value <= found.upper <= epsilon_rdp([sgd(*row) for row in rows], delta) <= 1.5 * found.value


def test_full_participation_follows_the_gaussian_closed_form():
    found = epsilon([sgd(2.0, 1.0, 4)], 0.126936737507)  # mu = 1: delta(1) = Phi(-1/2) - e Phi(-3/2)
    assert found.value == pytest.approx(1.0, abs=1e-6)
    assert found.accountant == "gaussian"


def test_nothing_done_costs_nothing():
    assert epsilon([], 1e-5) == Epsilon(value=0.0, lower=0.0, upper=0.0, delta=1e-5, accountant="none")
    assert epsilon([sgd(0.0, 0.5, 0)], 1e-5).upper == 0
    assert epsilon_rdp([], 1e-5) == 0


@pytest.mark.parametrize("naked", [sgd(0.0, 0.1, 1), release(0.0), ExactAnswer(question="dice")])
def test_anything_without_noise_makes_epsilon_infinite(naked):
    private = [sgd(5.0, 0.1, 10), NoisedCounts(epsilon=0.5)]
    assert epsilon([*private, naked], 1e-5).lower == math.inf
    assert epsilon_rdp([*private, naked], 1e-5) == math.inf


def test_a_release_is_one_step_with_everybody_in_it():
    assert epsilon([release(2.0)], 1e-4) == epsilon([sgd(2.0, 1.0, 1)], 1e-4)
    together = [sgd(2.0, 0.2, 50), release(3.0), release(3.0)]
    assert epsilon(together, 1e-4) == epsilon([sgd(2.0, 0.2, 50), sgd(3.0, 1.0, 2)], 1e-4)
    assert epsilon_rdp(together, 1e-4) == epsilon_rdp([sgd(2.0, 0.2, 50), sgd(3.0, 1.0, 2)], 1e-4)


def test_warm_up_training_and_answers_of_several_rounds_compose_as_an_independent_accountant_says():
    """Two studies and a restarted round: the round that was begun twice counts twice."""
    first = [release(3.0), *[sgd(3.2, 0.5, 20)] * 5, NoisedCounts(epsilon=0.3)]
    second = [release(6.0), *[sgd(4.0, 0.25, 30)] * 2]
    found = epsilon(first + second, 1e-3)
    gaussian = oracle(1e-3, (3.2, 0.5, 100), (4.0, 0.25, 60), releases=(3.0, 6.0))
    assert found.lower - 0.3 <= gaussian <= found.upper - 0.3
    assert found.upper <= epsilon_rdp(first + second, 1e-3) <= 1.25 * found.upper
    # Composing the counts as well is tighter than adding them up, so the sum stays a bound.
    assert oracle(1e-3, (3.2, 0.5, 100), (4.0, 0.25, 60), releases=(3.0, 6.0), counts=(0.3,)) < found.upper


def test_a_release_composes_tighter_than_by_adding_budgets():
    parts = epsilon([release(3.0)], 1e-3).upper + epsilon([sgd(3.2, 0.5, 100)], 1e-3).upper
    assert epsilon([release(3.0), sgd(3.2, 0.5, 100)], 1e-3).upper < 0.9 * parts


@pytest.mark.parametrize("eps", [0.01, 1.0, 8.0, 40.0])
def test_the_largest_signal_of_a_release_spends_exactly_its_epsilon(eps):
    mu = gaussian_mu(eps, 1e-4)
    assert epsilon([release(1 / mu)], 1e-4).value == pytest.approx(eps, rel=1e-6)
    assert gaussian_log_delta(eps, mu) <= math.log(1e-4) < gaussian_log_delta(eps, mu * (1 + 1e-6))


@pytest.mark.parametrize(("eps", "delta"), [(0.0, 1e-4), (-1.0, 1e-4), (1.0, 0.0), (1.0, 1.0), (math.nan, 1e-4)])
def test_no_signal_is_given_for_a_target_out_of_range(eps, delta):
    with pytest.raises(ValueError, match=r"epsilon|delta"):
        gaussian_mu(eps, delta)


def test_noised_counts_add_their_whole_epsilon_to_training():
    training = epsilon([sgd(2.0, 0.2, 50)], 1e-4)
    both = epsilon([sgd(2.0, 0.2, 50), NoisedCounts(epsilon=0.5), NoisedCounts(epsilon=0.25)], 1e-4)
    assert (both.lower, both.value, both.upper) == tuple(
        x + 0.75 for x in (training.lower, training.value, training.upper)
    )
    assert epsilon([NoisedCounts(epsilon=0.1)] * 10, 1e-4).upper == pytest.approx(1.0, abs=1e-12)


def test_rounds_compose_to_exactly_the_campaign_whatever_their_order():
    campaign = epsilon([sgd(1.5, 0.1, 60), sgd(3.0, 0.2, 10)], 1e-4)
    rounds = epsilon([sgd(1.5, 0.1, 20), sgd(3.0, 0.2, 10), sgd(1.5, 0.1, 20), sgd(1.5, 0.1, 20)], 1e-4)
    assert rounds == campaign


def test_one_round_more_costs_more_than_a_new_account_each_round_would_say():
    one = epsilon([sgd(1.5, 0.2, 20)], 1e-4).value
    ten = epsilon([sgd(1.5, 0.2, 20)] * 10, 1e-4).value
    assert one < 2 * one < ten < 10 * one


def test_what_a_lax_delta_covers_alone_costs_no_epsilon():
    found = epsilon([sgd(1000.0, 0.16, 300)], 0.0135)
    assert found == Epsilon(value=0.0, lower=0.0, upper=0.0, delta=0.0135, accountant="prv")


def test_a_hopeless_mechanism_still_gets_an_upper_bound():
    found = epsilon([sgd(0.3, 0.1, 1000)], 1e-4)
    assert found.accountant == "rdp"
    assert found.lower == 0
    assert 100 < found.upper < math.inf


def test_patches_and_patients_are_never_added_up():
    assert epsilon([sgd(2.0, 0.1, 10, Unit.PATCH)], 1e-4).upper == epsilon([sgd(2.0, 0.1, 10)], 1e-4).upper
    with pytest.raises(ValueError, match="patch-level"):
        epsilon([sgd(2.0, 0.1, 10), sgd(2.0, 0.1, 10, Unit.PATCH)], 1e-4)
    for private in (NoisedCounts(epsilon=1.0), release(1.0)):
        with pytest.raises(ValueError, match="patch-level"):
            epsilon([private, sgd(2.0, 0.1, 10, Unit.PATCH)], 1e-4)
    with pytest.raises(ValueError, match="patch-level"):
        epsilon([NoisedCounts(epsilon=1.0), sgd(2.0, 0.1, 10, Unit.PATCH)], 1e-4)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_its_range_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        epsilon([], delta)


def test_an_epsilon_whose_bound_is_below_its_value_cannot_exist():
    with pytest.raises(ValueError, match="upper"):
        Epsilon(value=2.0, lower=1.0, upper=1.9, delta=1e-5, accountant="prv")
