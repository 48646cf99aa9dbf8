"""What accounting by patch prints, and what a patient pays.  [Kossen et al. 2022, DP-WGAN for TOF-MRA]

The published system cuts 1000 patches out of each of 41 patients, treats each patch as a person, and uses one drawn
batch for five critic steps. Its README's setting, accounted in four ways: as its code prints it; as it was executed;
as it would be with a fresh batch for each step, which is what the printed formula is about; and for a patient
with all patches. The same comparison is made for a study of ours in paper mode.

A patient's k patches are drawn one by one, so K ~ Binomial(k, q) of them are in a batch, and where their clipped
gradients agree they move the sum by K clip norms: a mixture of Gaussians, a step's worst case.
[Choquette-Choo et al. 2024] It composes by Renyi divergence at orders near one, which such epsilons need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import binom

from common.privacy.accounting import Epsilon, epsilon, epsilon_rdp
from common.privacy.mechanism import DpSgd, Plan, Unit

Floats = NDArray[np.float64]

ORDERS = 1 + np.logspace(-4, 1.5, 45)
LARGEST_REACH = 2000.0  # order * shift in deviations; a higher order never gives the least bound for such shifts
NEGLIGIBLE = 1e-18  # numbers of patches less likely than this in a draw are not told apart
POINTS_PER_DEVIATION = 8
POINTS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class PublishedSetting:
    """One run of the published code. batch: expected patches a draw; steps_per_draw: critic steps that share it."""

    patients: int
    patches_per_patient: int
    batch: int
    noise_multiplier: float
    steps_per_draw: int
    epochs: int

    @property
    def patches(self) -> int:
        """All records, as the code counts them."""
        return self.patients * self.patches_per_patient

    @property
    def sampling_probability(self) -> float:
        """Of one patch in one draw."""
        return self.batch / self.patches

    @property
    def draws(self) -> int:
        """Batches in the whole run: whole ones in each epoch."""
        return self.epochs * (self.patches // self.batch)

    @property
    def delta(self) -> float:
        """As the code sets it."""
        return 1 / self.patches


README = PublishedSetting(
    patients=41, patches_per_patient=1000, batch=32, noise_multiplier=1.0, steps_per_draw=5, epochs=50
)


def as_printed(setting: PublishedSetting) -> float:
    """Patch-level epsilon that the code prints, by Renyi divergence as it does.

    Real and fake batch are two noised steps each time; all are counted as if each had a draw of its own.
    """
    return epsilon_rdp([_patches(setting, setting.noise_multiplier, 2 * setting.steps_per_draw)], setting.delta)


def as_executed(setting: PublishedSetting) -> float:
    """Patch-level epsilon of what it does: several steps on one draw are one step of less noise inside the draw."""
    noise = setting.noise_multiplier / math.sqrt(setting.steps_per_draw)
    return epsilon_rdp([_patches(setting, noise, 1)], setting.delta)


def fresh_draws(setting: PublishedSetting) -> float:
    """Patch-level epsilon if each critic step drew its own batch and only real batches cost."""
    return epsilon_rdp([_patches(setting, setting.noise_multiplier, setting.steps_per_draw)], setting.delta)


def patient_level(setting: PublishedSetting) -> float:
    """Upper bound on the epsilon of a patient with all patches, of what was executed.

    About 1.8e5 for the README; still 1.1e4 for somebody of whom never more than one patch counts in a draw,
    and if no draw were used again.
    """
    return _patient_epsilon(
        patches=setting.patches_per_patient,
        probability=setting.sampling_probability,
        noise=setting.noise_multiplier / math.sqrt(setting.steps_per_draw),
        steps=setting.draws,
        delta=setting.delta,
    )


@dataclass(frozen=True, kw_only=True)
class ByUnit:
    """One training, accounted for three units of privacy at the same delta; upper bounds.

    patch: what an accountant prints that takes each patch for a person. patient_of_patches: what that training would
    really cost a patient with this many patches. patient: what this platform does, one clipped gradient a patient.
    """

    patches_per_patient: int
    patch: float
    patient_of_patches: float
    patient: Epsilon


def by_unit(plan: Plan, patches_per_patient: int) -> ByUnit:
    """The plan's noise, sampling and steps read by patch, as published, and by patient, side by side.

    For a study in paper mode. Infinite where the plan has no noise. Raises ValueError for no patches.
    """
    if patches_per_patient < 1:
        raise ValueError(f"a patient has at least one patch, got {patches_per_patient}")
    m = plan.mechanism
    patch = DpSgd(
        noise_multiplier=m.noise_multiplier,
        sampling_probability=m.sampling_probability,
        steps=m.steps,
        unit=Unit.PATCH,
    )
    return ByUnit(
        patches_per_patient=patches_per_patient,
        patch=epsilon([patch], plan.delta).upper,
        patient_of_patches=_patient_epsilon(
            patches=patches_per_patient,
            probability=m.sampling_probability,
            noise=m.noise_multiplier,
            steps=m.steps,
            delta=plan.delta,
        ),
        patient=epsilon(plan.mechanisms, plan.delta),
    )


def by_unit_text(found: ByUnit) -> str:
    """Both numbers in one sentence, loudly: the smaller one protects nobody."""
    return (
        f"Paper mode. Counted by patch, as published, epsilon would read {found.patch:.2f}; that is NOT a guarantee "
        f"for a patient, who with {found.patches_per_patient} patches would pay up to {found.patient_of_patches:.3g}. "
        f"This platform clips each patient once: epsilon {found.patient.upper:.2f} for a patient "
        f"(delta {found.patient.delta:g})."
    )


def _patches(setting: PublishedSetting, noise: float, steps_per_draw: int) -> DpSgd:
    return DpSgd(
        noise_multiplier=noise,
        sampling_probability=setting.sampling_probability,
        steps=setting.draws * steps_per_draw,
        unit=Unit.PATCH,
    )


def _patient_epsilon(*, patches: int, probability: float, noise: float, steps: int, delta: float) -> float:
    """Upper bound for a patient all of whose patches pull the same way."""
    if noise == 0:
        return math.inf
    chances = binom.pmf(np.arange(patches + 1), patches, probability)
    kept = np.flatnonzero(chances > NEGLIGIBLE)
    first, last = int(kept[0]), int(kept[-1])
    # Fewer patches than `first` count as `first`; more than `last` happen with a chance that is taken from delta.
    chances = chances[first : last + 1]
    chances[0] += binom.cdf(first - 1, patches, probability)
    left = delta - steps * float(binom.sf(last, patches, probability))
    if left <= 0:
        raise ValueError(f"delta {delta:g} is too small for {steps} steps of {patches} patches; nothing was computed")
    orders, renyi = _mixture_renyi(np.arange(first, last + 1) / noise, chances)
    bounds = steps * renyi + np.log1p(-1 / orders) - (math.log(left) + np.log(orders)) / (orders - 1)
    return max(float(bounds.min()), 0.0)


def _mixture_renyi(shifts: Floats, chances: Floats) -> tuple[Floats, Floats]:
    """Orders, and the larger of both Renyi divergences between the mixture of N(shift, 1) and N(0, 1), at each.

    By the trapezoid rule, which for such integrands is exact but for the last digits.
    """
    orders = ORDERS[(ORDERS * shifts[-1] <= LARGEST_REACH) | (ORDERS < 1.1)]
    reach = 12 + float(orders[-1]) * float(shifts[-1])
    x = np.arange(-reach, reach, 1 / POINTS_PER_DEVIATION)
    logs = [
        logsumexp(np.log(chances) + np.outer(piece, shifts) - shifts**2 / 2, axis=1)
        for piece in np.array_split(x, math.ceil(len(x) / POINTS_AT_ONCE))
    ]
    ratio = np.concatenate(logs)  # log density of the mixture over the one of N(0, 1)
    base = -(x**2) / 2 - math.log(math.sqrt(2 * math.pi) * POINTS_PER_DEVIATION)
    divergences = [max(logsumexp(base + a * ratio), logsumexp(base + (1 - a) * ratio)) / (a - 1) for a in orders]
    return orders, np.maximum(divergences, 0.0)
