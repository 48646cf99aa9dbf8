"""From a privacy target to the plan that training accepts: the least noise that keeps the promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from scipy.optimize import brentq

from common.errors import SettingsError
from common.privacy.accounting import epsilon, epsilon_rdp, gaussian_mu
from common.privacy.mechanism import DpSgd, GaussianRelease, Mechanism, Plan
from common.settings.load import privacy_problems
from common.settings.study import PrivacySettings, Study, TrainingSettings

NOISE_SMALLEST = 0.2  # protects nobody, and below it the accountants crawl; a laxer target gets this much noise
NOISE_LARGEST = 1000.0  # above this a step carries no signal; a target that needs more is refused
TOLERANCE = 1e-3  # relative, on the noise multiplier


def calibrate(privacy: PrivacySettings, training: TrainingSettings, warm_up_share: float = 0.0) -> Plan:
    """The plan of a whole campaign: rounds * critic_steps_per_round noised steps within target_epsilon.

    warm_up_share: in [0, 1); above zero the plan begins with one release that alone costs this share of the target.
    The training noise is then what keeps release and steps together within it; they compose, so together they
    get less noise than two budgets of their own would give.

    The noise multiplier is the smallest, to 0.1 % and not below NOISE_SMALLEST, whose epsilon is proven to be
    at most the target. The noised sum is divided by a public constant, sampling_probability * reference_patients.
    Without a target the plan has no noise: research only. Takes about 1 s the first time, 5 s for 20 000 steps.
    Raises SettingsError with every problem when the target cannot be met.
    """
    problems = list(privacy_problems(privacy))
    if not 0 <= warm_up_share < 1:
        problems.append(f"warm_up_share {warm_up_share:g} must lie in [0, 1): training needs a share as well")
    if problems:
        raise SettingsError("\n".join(f"privacy target: {problem}" for problem in problems))
    steps = training.rounds * training.critic_steps_per_round
    noise, warm_up = 0.0, GaussianRelease(noise_multiplier=0.0) if warm_up_share > 0 else None
    if privacy.target_epsilon is not None:
        target, delta = privacy.target_epsilon, privacy.delta
        if warm_up is not None:
            warm_up = GaussianRelease(noise_multiplier=1 / gaussian_mu(warm_up_share * target, delta))
        noise = _least_noise(target, delta, privacy.sampling_probability, steps, warm_up)
    return Plan(
        mechanism=DpSgd(noise_multiplier=noise, sampling_probability=privacy.sampling_probability, steps=steps),
        clip_norm=privacy.clip_norm,
        divisor=privacy.sampling_probability * privacy.reference_patients,
        steps_per_round=training.critic_steps_per_round,
        rounds=training.rounds,
        target_epsilon=privacy.target_epsilon,
        delta=privacy.delta,
        warm_up=warm_up,
    )


def plan_of(study: Study) -> Plan:
    """The plan of a study, with the share of its warm-up if it has one. Raises SettingsError as `calibrate` does."""
    return calibrate(study.privacy, study.training, study.warm_up.share if study.warm_up else 0.0)


@lru_cache(maxsize=64)
def _least_noise(
    target: float, delta: float, probability: float, steps: int, before: GaussianRelease | None = None
) -> float:
    """Smallest noise multiplier of the steps, within TOLERANCE, so that all together has an epsilon <= target."""

    def all_of(log_noise: float) -> list[Mechanism]:
        training = DpSgd(noise_multiplier=math.exp(log_noise), sampling_probability=probability, steps=steps)
        return [training] if before is None else [before, training]

    def bound(log_noise: float) -> float:
        return epsilon(all_of(log_noise), delta).upper

    def renyi_bound(log_noise: float) -> float:
        return epsilon_rdp(all_of(log_noise), delta)

    smallest, largest = math.log(NOISE_SMALLEST), math.log(NOISE_LARGEST)
    reachable = bound(largest)
    if reachable > target:
        with_release = "" if before is None else ", the warm-up release included"
        raise SettingsError(
            f"privacy.target_epsilon: {target:g} at delta {delta:g} cannot be kept over {steps} steps at sampling "
            f"probability {probability:g}: even a noise multiplier of {NOISE_LARGEST:g} costs {reachable:.3g}"
            f"{with_release}. Nothing was started. Raise target_epsilon, or lower rounds, critic_steps_per_round or "
            "sampling_probability."
        )
    if bound(smallest) <= target:
        return NOISE_SMALLEST
    # RDP is cheap and asks for more noise than PRV, so its answer brackets the expensive one from above.
    high = _root(renyi_bound, target, smallest, largest) + TOLERANCE if renyi_bound(largest) <= target else largest
    low = high
    while bound(low) <= target:
        low, high = max(low - 0.2, smallest), low
    # Half the tolerance to the safe side: another machine's last digits must not push the plan over its target.
    log_noise = _root(bound, target, low, high) + TOLERANCE / 2
    while bound(log_noise) > target:
        log_noise += TOLERANCE / 4
    return _rounded_up(math.exp(log_noise))


def _rounded_up(noise: float) -> float:
    """More noise, on a public grid of a millionth: a sum in another order, as with another number of threads, differs
    in the twelfth digit, and a run that is resumed there must find the plan that it began with.
    """
    return math.ceil(noise * 1e6) / 1e6


def _root(bound: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Log noise in [low, high] where the falling `bound` meets the target, to TOLERANCE / 4.

    Both axes are logarithmic, where the curve is almost straight.
    """

    def distance(log_noise: float) -> float:
        return math.log(max(bound(log_noise), 1e-12) / target)

    return float(brentq(distance, low, high, xtol=TOLERANCE / 4))
