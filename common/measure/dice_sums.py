"""Dice of many patients as integer sums, so that a site can answer with discrete noise and the coordinator can read it.

A patient adds to each label's sum how far its Dice lies from one half, and one to the count. Measured from
one half, a patient moves a sum by at most 1/2 instead of 1, and an error of the count hardly moves the mean:
the same epsilon buys about half the noise of plain sums. Integers in units of 1/UNITS, because
Laplace noise on floating-point numbers leaks through their low bits.  [Mironov 2012]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNITS = 1024  # steps per unit of Dice: finer than any noise, coarse enough for exact sums
CENTRE = 0.5


def total_units(dice: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n, K) Dice of n patients -> (K + 1,) integers: K sums of (Dice - 1/2), then the count, in 1/UNITS.

    Dice outside [0, 1] is clipped; one that is not a number counts as 0.
    """
    clean = np.nan_to_num(dice, nan=0.0).clip(0.0, 1.0)
    sums = np.rint((clean - CENTRE) * UNITS).astype(np.int64).sum(axis=0)
    return np.append(sums, np.int64(len(dice) * UNITS))


def sensitivity_units(labels: int) -> int:
    """L1 distance between the totals of two cohorts that differ by one patient: K/2 + 1, in 1/UNITS."""
    return labels * UNITS // 2 + UNITS


def noise_epsilon(labels: int, epsilon: float) -> float:
    """Parameter of the discrete Laplace noise per unit that makes the vector epsilon-DP.  [Ghosh et al. 2012]"""
    return epsilon / sensitivity_units(labels)


def noise_variance(labels: int, epsilon: float) -> float:
    """Variance of the noise on each sum and on the count, in squares of one Dice.

    Discrete Laplace with ratio a = exp(-epsilon): 2 a / (1 - a)^2.
    """
    a = math.exp(-noise_epsilon(labels, epsilon))
    return 2.0 * a / (1.0 - a) ** 2 / UNITS**2


def to_answer(units: NDArray[np.int64]) -> tuple[tuple[float, ...], float]:
    """Totals in units -> (sum of Dice per label, number of patients), as a reply carries them; exact in binary."""
    patients = int(units[-1]) / UNITS
    return tuple(int(u) / UNITS + CENTRE * patients for u in units[:-1]), patients


def mean_and_variance(
    dice_sum: Sequence[float], patients: float, *, variance_of_noise: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean Dice per label and the variance of its error, each (K,), from added-up answers.

    variance_of_noise: of the added-up noise on each sum and on the count; 0 for exact answers.
    With T the sum measured from one half, the mean is 1/2 + T/n and, to first order in the noise,
    its variance from noise is v (1 + (mean - 1/2)^2) / n^2. Sampling adds at most mean (1 - mean) / n: the largest
    spread that numbers in [0, 1] with this mean can have [Bhatia and Davis 2000], since values of
    single patients never leave their hospital.
    The mean itself is not clipped: noise may carry it just outside [0, 1].
    Raises ValueError when the noised count is not positive.
    """
    if not patients > 0:
        raise ValueError(f"no mean over {patients:g} patients")
    mean = np.asarray(dice_sum, dtype=np.float64) / patients
    noise = variance_of_noise * (1.0 + (mean - CENTRE) ** 2) / patients**2
    inside = mean.clip(0.0, 1.0)
    return mean, noise + inside * (1.0 - inside) / patients
