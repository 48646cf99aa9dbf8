"""Which plan suits a small cohort, and whether any can: from public constants only, never from a look at patients.

The law. A campaign of T noised steps over N patients, each drawn with probability q, needs a noise multiplier
s = c q sqrt(T), where c = 1 / `gaussian_mu` depends on epsilon and delta alone. The noise on the summed gradient has
norm s sqrt(P) for a critic of P parameters; the signal is at most q N clip norms a step and adds up over steps
as T against the noise's sqrt(T). What is left over a campaign is

    rho = s sqrt(P) / (q N sqrt(T)) = c sqrt(P) / N

Batch and number of steps cancel. What helps is more patients, a smaller critic, a larger epsilon, or a start so good
that little signal is needed. Below s = 2 subsampling hides less and s lies above the law, so it is avoided.

The thresholds are heuristics: published DP GANs trained from nothing on 2-D images (0.015 works, at 0.09 it is
degraded), and for a public start a toy of 8-voxel tumours (0.08 near the best possible, up to 1.6 a gain, none at 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from common.privacy.accounting import gaussian_mu
from common.privacy.mechanism import Plan

LEAST_PROBABILITY = 0.25  # q hardly changes rho; a large draw is the steadier one, and leaves less to sampling
PATIENTS_A_STEP = 32
LEAST_NOISE = 2.0
STEPS_GRAIN = 100
MOST_STEPS = 20_000
CRITIC_STEPS_FROM_PUBLIC_START = 5
# Adam divides by the gradient's size, so only directions count, and a norm that nearly every patient exceeds lets each
# speak equally loud. Phantoms in the shipped critics have gradients of norm 10 to 15, or none where the hinge is met.
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the rule proposes for a study's settings.

    critic_steps_per_generator_step: at the start. adaptive: the ladder may raise it.
    """

    sampling_probability: float
    steps: int
    clip_norm: float
    critic_steps_per_generator_step: int
    adaptive: bool


class Feasibility(StrEnum):
    """What a noise-to-signal ratio lets one expect."""

    COMFORTABLE = "comfortable"
    WEAK = "weak"
    INFEASIBLE = "infeasible"


def choose(*, reference_patients: int, target_epsilon: float, delta: float, warm_start: bool) -> Choice:
    """The rule for a cohort of one site; above a thousand patients it still holds but asks for large draws.

    q: about 32 patients a step, at least a quarter of them; everybody where there are no more than 32, so that
    nothing hangs on sampling. T: 1000 steps, 2000 from 200 patients, 5000 from 1000, and more where the
    noise would fall below 2. n_D: 5 from a public start, where more would starve the generator; without one the
    ladder begins at 1. The critic's size is not asked for: no choice of these makes up for one that is too large,
    see `law`. Raises ValueError for constants out of range.
    """
    if reference_patients < 1:
        raise ValueError(f"need at least one patient, got {reference_patients}")
    probability = max(LEAST_PROBABILITY, math.ceil(100 * min(1.0, PATIENTS_A_STEP / reference_patients)) / 100)
    steps = 1000 if reference_patients < 200 else 2000 if reference_patients < 1000 else 5000
    enough = (LEAST_NOISE * gaussian_mu(target_epsilon, delta) / probability) ** 2
    return Choice(
        sampling_probability=probability,
        steps=min(MOST_STEPS, STEPS_GRAIN * math.ceil(max(steps, enough) / STEPS_GRAIN)),
        clip_norm=CLIP_NORM,
        critic_steps_per_generator_step=CRITIC_STEPS_FROM_PUBLIC_START if warm_start else 1,
        adaptive=not warm_start,
    )


def law(*, target_epsilon: float, delta: float, reference_patients: int, critic_parameters: int) -> float:
    """Noise to signal over a campaign, c sqrt(P) / N, before any plan is chosen."""
    return math.sqrt(critic_parameters) / (gaussian_mu(target_epsilon, delta) * reference_patients)


def noise_to_signal(plan: Plan, critic_parameters: int) -> float:
    """Noise to signal of a plan with its own noise; 0 without. A few per cent above `law`, if the plan is sound."""
    mechanism = plan.mechanism
    noise = mechanism.noise_multiplier * math.sqrt(critic_parameters)
    return noise / (plan.divisor * math.sqrt(mechanism.steps))


def feasibility(rho: float, *, warm_start: bool) -> Feasibility:
    """What can be expected at this noise-to-signal ratio."""
    comfortable, weak = (0.1, 2.0) if warm_start else (0.015, 0.09)
    if rho <= comfortable:
        return Feasibility.COMFORTABLE
    return Feasibility.WEAK if rho <= weak else Feasibility.INFEASIBLE


def feasibility_text(rho: float, *, warm_start: bool) -> str:
    """One sentence for people who choose a study's settings."""
    found = feasibility(rho, warm_start=warm_start)
    start = "from a public start" if warm_start else "from nothing"
    match found:
        case Feasibility.COMFORTABLE:
            words = f"training {start} should come close to training without noise"
        case Feasibility.WEAK:
            words = f"training {start} can gain something, clearly less than without noise"
        case Feasibility.INFEASIBLE:
            words = f"no gain is to be expected {start}; take a smaller critic, more patients, a larger epsilon" + (
                " or a warm-up release alone" if warm_start else " or a public start"
            )
        case _:
            assert_never(found)
    return f"Noise is {rho:.2g} of the strongest possible signal over the campaign ({found.value}): {words}."
