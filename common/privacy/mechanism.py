"""What was done to private data: frozen values that accounting reads and the ledger stores.

The meaning of a class here never changes; a new meaning gets a new class. Neighbouring
cohorts differ by adding or removing one patient with all of that patient's scans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """Whose presence the guarantee hides. PATCH exists only to account published systems."""

    PATIENT = "patient"
    PATCH = "patch"


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """Poisson-subsampled Gaussian mechanism, `steps` times.  [Abadi et al. 2016, Alg. 1]

    noise_multiplier: noise standard deviation / clip norm; 0 means no privacy (research simulation).
    sampling_probability: chance that a unit is drawn in a step, independent of every other unit.
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    unit: Unit = Unit.PATIENT

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier must be finite and >= 0, got {self.noise_multiplier}")
        if not 0 < self.sampling_probability <= 1:
            raise ValueError(f"sampling_probability must lie in (0, 1], got {self.sampling_probability}")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class GaussianRelease:
    """One vector, released once with Gaussian noise; the unit is the patient.  [Dwork & Roth 2014, Appendix A]

    One patient, with all of that patient's scans, changes the vector by at most one in L2 norm, counted in
    its clip norm. It is the DpSgd of a single step with everybody in it, and composes like one.

    noise_multiplier: noise standard deviation / clip norm; 0 means no privacy (research simulation).
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier must be finite and >= 0, got {self.noise_multiplier}")


@dataclass(frozen=True, kw_only=True)
class NoisedCounts:
    """Integer counts released with discrete Laplace noise; one patient changes one count by at most one.

    epsilon: pure differential privacy of the whole vector of counts.  [Ghosh et al. 2012]
    """

    epsilon: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon must be finite and > 0, got {self.epsilon}")


@dataclass(frozen=True, kw_only=True)
class ExactAnswer:
    """An answer about private data released without noise: no privacy at all.

    Exists so that a research simulation that looks at private data says so in its ledger
    (epsilon becomes infinite for that cohort); a real site refuses to give one.
    """

    question: str


Mechanism = DpSgd | GaussianRelease | NoisedCounts | ExactAnswer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The only thing training accepts: sampler, clip norm, noise, divisor and steps, fixed together.

    Made by `common.privacy.calibration.calibrate` from public constants; it says nothing about
    how many patients a site has.

    mechanism: the whole campaign (all rounds).
    clip_norm: bound C on the L2 norm of one patient's gradient.
    divisor: public constant the noised sum is divided by; never the realised batch size.
    steps_per_round: critic steps of one round; mechanism.steps = rounds * steps_per_round.
    target_epsilon: what the noise was calibrated to; None only for a research plan without noise.
    warm_up: one release before the first round, None for a plan that goes straight to training.
    """

    mechanism: DpSgd
    clip_norm: float
    divisor: float
    steps_per_round: int
    rounds: int
    target_epsilon: float | None
    delta: float
    warm_up: GaussianRelease | None = None

    def __post_init__(self) -> None:
        if self.clip_norm <= 0 or self.divisor <= 0:
            raise ValueError(f"clip_norm and divisor must be > 0, got {self.clip_norm}, {self.divisor}")
        if self.mechanism.steps != self.rounds * self.steps_per_round:
            raise ValueError(
                f"{self.rounds} rounds of {self.steps_per_round} steps are not {self.mechanism.steps} steps"
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")
        for part in self.mechanisms:
            if (self.target_epsilon is None) != (part.noise_multiplier == 0):
                raise ValueError("a plan has noise, everywhere, if and only if it has a target epsilon")

    @property
    def mechanisms(self) -> tuple[DpSgd | GaussianRelease, ...]:
        """Everything that the plan does to a patient it trains on, in order."""
        return (self.mechanism,) if self.warm_up is None else (self.warm_up, self.mechanism)

    @property
    def one_round(self) -> DpSgd:
        """The mechanism of a single round, which is what a site reserves in its ledger."""
        m = self.mechanism
        return DpSgd(
            noise_multiplier=m.noise_multiplier,
            sampling_probability=m.sampling_probability,
            steps=self.steps_per_round,
            unit=m.unit,
        )
