"""How much privacy a list of mechanisms has cost one patient: epsilon at a fixed delta.

Two accountants that share only the definition of the mechanism: privacy loss random variables
(PRV), whose upper bound is what budgets and caps are compared with, and Renyi divergences (RDP)
as cross-check. Everything is computed from the frozen mechanisms; no running state can drift.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import assert_never

import numpy as np
from scipy.special import log_ndtr

from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, Mechanism, NoisedCounts, Unit

EPSILON_ERROR = 0.01  # half-width that PRV is asked for
PRV_LIMIT = 60.0  # above this RDP epsilon no patient is protected and the PRV grid would overflow
# Renyi orders; any set gives a valid bound. Fractions matter where epsilon is large, and with much noise their
# series converge too slowly to be worth it.
FRACTIONS = (1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.25, 2.5, 2.75, 3.5, 4.5)
WHOLE = (*(float(order) for order in range(2, 48)), *(float(round(48 * 1.15**k)) for k in range(20)))
FRACTIONS_BELOW_NOISE = 4.0

Loss = tuple[float, float, int]  # noise multiplier, sampling probability, steps


@dataclass(frozen=True, kw_only=True)
class Epsilon:
    """Privacy loss of one patient at `delta`; the truth lies in [lower, upper].

    value: best estimate, for display. upper: what is compared with budgets and caps, never below value.
    accountant: `prv`, `gaussian` (every patient in every step: exact), `rdp` (only an upper bound; lower is 0),
    `pure` (noised counts alone), `none` (nothing was done) or `unbounded` (something was released without noise).
    """

    value: float
    lower: float
    upper: float
    delta: float
    accountant: str

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.value <= self.upper:
            raise ValueError(f"need 0 <= lower <= value <= upper, got {self.lower}, {self.value}, {self.upper}")


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> Epsilon:
    """Epsilon of one patient who took part in all `mechanisms`, in any order.

    DpSgd composes tightly [Gopi et al. 2021]; noised counts are pure and add up [basic composition:
    (e1, d) then (e2, 0) is (e1 + e2, d)]. An exact answer, or steps without noise, is infinite.
    Costs 0.1 to 0.4 s for a new list, nothing for one seen before. delta: in (0, 1).
    Raises ValueError when patient-level and patch-level mechanisms are mixed.
    """
    _check_delta(delta)
    history, pure = _merge(mechanisms)
    if history is None:
        return Epsilon(value=math.inf, lower=math.inf, upper=math.inf, delta=delta, accountant="unbounded")
    if not history:
        return Epsilon(value=pure, lower=pure, upper=pure, delta=delta, accountant="pure" if pure else "none")
    sgd = _subsampled_gaussian(history, delta)
    return Epsilon(
        value=sgd.value + pure,
        lower=sgd.lower + pure,
        upper=sgd.upper + pure,
        delta=delta,
        accountant=sgd.accountant,
    )


def epsilon_rdp(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Upper bound by Renyi divergences, independent of `epsilon`'s PRV arithmetic.  [Mironov et al. 2019]

    Some per cent above the truth; about 0.02 s. delta: in (0, 1). Raises ValueError as `epsilon`.
    """
    _check_delta(delta)
    history, pure = _merge(mechanisms)
    if history is None:
        return math.inf
    return (_renyi(history, delta) if history else 0.0) + pure


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")


def _merge(mechanisms: Sequence[Mechanism]) -> tuple[tuple[Loss, ...] | None, float]:
    """Noised training merged by equal (noise, sampling), sorted, and the summed pure epsilon.

    The history is None when anything was released without noise.
    """
    steps: dict[tuple[float, float], int] = {}
    pure: list[float] = []
    units: set[Unit] = set()
    unbounded = False
    for mechanism in mechanisms:
        match mechanism:
            case DpSgd():
                if mechanism.steps == 0:
                    continue
                units.add(mechanism.unit)
                key = (float(mechanism.noise_multiplier), float(mechanism.sampling_probability))
                unbounded = unbounded or key[0] == 0
                steps[key] = steps.get(key, 0) + mechanism.steps
            case GaussianRelease():
                units.add(Unit.PATIENT)
                key = (float(mechanism.noise_multiplier), 1.0)
                unbounded = unbounded or key[0] == 0
                steps[key] = steps.get(key, 0) + 1
            case NoisedCounts():
                units.add(Unit.PATIENT)
                pure.append(mechanism.epsilon)
            case ExactAnswer():
                unbounded = True
            case _:
                assert_never(mechanism)
    if len(units) > 1:
        raise ValueError("patient-level and patch-level mechanisms have no common epsilon; account for them apart")
    history = tuple((noise, probability, n) for (noise, probability), n in sorted(steps.items()))
    return (None if unbounded else history), math.fsum(pure)


@lru_cache(maxsize=1024)
def _subsampled_gaussian(history: tuple[Loss, ...], delta: float) -> Epsilon:
    if all(probability == 1 for _, probability, _ in history):
        return _gaussian(history, delta)
    ceiling = _renyi(history, delta)
    bounds = _prv(history, delta) if ceiling <= PRV_LIMIT else None
    if bounds is None:
        return Epsilon(value=ceiling, lower=0.0, upper=ceiling, delta=delta, accountant="rdp")
    lower, estimate, upper = bounds
    # Both are proven; for a tiny epsilon RDP is the tighter one, and below zero delta alone covers everything.
    upper = max(min(upper, ceiling), 0.0)
    value = min(max(estimate, 0.0), upper)
    return Epsilon(value=value, lower=min(max(lower, 0.0), value), upper=upper, delta=delta, accountant="prv")


def _prv(history: tuple[Loss, ...], delta: float) -> tuple[float, float, float] | None:
    """(lower, estimate, upper) by convolving discretised privacy losses.  [Gopi et al. 2021, Alg. 1, remark 5.6]

    None where floating point cannot carry the convolution; the caller then falls back on RDP.
    """
    # Here: it brings torch along, and whoever only reads messages (a site's runner) needs neither.
    from opacus.accountants.analysis.prv import (  # noqa: PLC0415
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        discretize,
    )

    delta_error = delta / 1000
    steps = [n for _, _, n in history]
    total = sum(steps)
    # The grid must hold the composed loss up to a tail of delta_error, and each single loss likewise.
    reach = max(
        _renyi(history, delta_error / 4),
        *(_renyi(((noise, probability, 1),), delta_error / (8 * total)) for noise, probability, _ in history),
        EPSILON_ERROR,
    )
    mesh = EPSILON_ERROR / math.sqrt(total * math.log(12 / delta_error) / 2)
    domain = Domain.create_aligned(-(reach + 3), reach + 3, mesh)
    # Far tails underflow harmlessly, and quadrature warns on flat pieces; the result is checked instead.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            losses = [
                discretize(
                    TruncatedPrivacyRandomVariable(
                        PoissonSubsampledGaussianPRV(probability, noise), domain.t_min, domain.t_max
                    ),
                    domain,
                )
                for noise, probability, _ in history
            ]
            composed = compose_heterogeneous(losses, steps)
            bounds = composed.compute_epsilon(delta, delta_error, EPSILON_ERROR)
        except (RuntimeError, ValueError):
            return None
    lower, estimate, upper = (float(b) for b in bounds)
    return (lower, estimate, upper) if lower <= estimate <= upper < math.inf else None


def _gaussian(history: tuple[Loss, ...], delta: float) -> Epsilon:
    """Exact epsilon when every patient is in every step: one Gaussian with the summed signal.  [Balle & Wang 2018]"""
    mu = math.sqrt(math.fsum(n / noise**2 for noise, _, n in history))
    target = math.log(delta)
    if gaussian_log_delta(0.0, mu) <= target:
        return Epsilon(value=0.0, lower=0.0, upper=0.0, delta=delta, accountant="gaussian")
    low, high = 0.0, max(1.0, mu)
    while gaussian_log_delta(high, mu) > target:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_log_delta(middle, mu) > target else (low, middle)
    return Epsilon(value=high, lower=low, upper=high, delta=delta, accountant="gaussian")


def gaussian_log_delta(epsilon: float, mu: float) -> float:
    """Logarithm of the least delta of one Gaussian release of signal / noise `mu`.  [Balle & Wang 2018, Theorem 8]"""
    first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(first + np.log1p(-np.exp(min(second - first, -1e-300))))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest signal / noise of one Gaussian release that keeps (epsilon, delta), to 1e-9 relative.

    Also of a whole campaign: steps of noise s with everybody in them add up to mu = sqrt(steps) / s, and
    subsampled ones come close to it.  [Dong et al. 2022]
    epsilon: > 0. delta: in (0, 1). Raises ValueError otherwise.
    """
    _check_delta(delta)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}")
    low, high = 1e-12, 1.0
    while gaussian_log_delta(epsilon, high) <= math.log(delta):
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_log_delta(epsilon, middle) > math.log(delta) else (middle, high)
    return low


def _renyi(history: tuple[Loss, ...], delta: float) -> float:
    """Upper bound on epsilon over a fixed set of orders; any order gives a valid bound.

    Conversion from Renyi to (epsilon, delta): [Balle et al. 2020, Theorem 21].
    """
    orders = np.array(FRACTIONS + WHOLE)
    with np.errstate(over="ignore", invalid="ignore"):
        renyi = np.sum([n * _renyi_of_step(noise, probability) for noise, probability, n in history], axis=0)
        bounds = renyi + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    usable = bounds[~np.isnan(bounds)]
    return max(float(usable.min()), 0.0) if usable.size else math.inf


@lru_cache(maxsize=1024)
def _renyi_of_step(noise: float, probability: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(orders,) Renyi divergence of one step at FRACTIONS + WHOLE; infinite (unused) where it is not computed."""
    from opacus.accountants.analysis.rdp import compute_rdp  # noqa: PLC0415  brings torch along

    fractions = np.full(len(FRACTIONS), np.inf)
    if noise < FRACTIONS_BELOW_NOISE:
        fractions = np.asarray(compute_rdp(q=probability, noise_multiplier=noise, steps=1, orders=list(FRACTIONS)))
    whole = np.asarray(compute_rdp(q=probability, noise_multiplier=noise, steps=1, orders=list(WHOLE)))
    return np.concatenate([fractions, whole])
