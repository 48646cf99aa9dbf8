"""The grid that noised sums are rounded to, what floats cost in spite of it, and the words for a report.

A site rounds (`client/training/noise.py` says why); whoever states its epsilon says what remains.
"""

from __future__ import annotations

import math

# The clipped sum is float32. Summing B vectors of norm C one after the other may miss by B^2 2^-24 C, with and
# without a patient alike, and a norm is computed apart from the gradient that it clips. Noise larger by this covers
# 90 rows a step (patients, and generated volumes by their weight) in the worst order of addition. Above that it is no
# bound any more, but a measured margin: the error of real sums is about 1e-6 C, a thousandth of it.
SENSITIVITY_SLACK = 1e-3
GRID_BITS = 10

# Error of one normal before rounding, in deviations: the arithmetic, for sums up to 16 deviations a coordinate, ...
ARITHMETIC_ERROR = 2.0**-47
RADIUS_RESOLUTION = 2.0**-75  # ... and half the spacing of the uniform that the radius is made of
LARGEST_MU = 10.0  # of a campaign as one Gaussian mechanism; epsilon is then far above anything meaningful


def grid_of(scale: float) -> float:
    """Step of the grid: the power of two between scale / 2048 and scale / 1024. Public, as the scale is."""
    return 2.0 ** (math.frexp(scale)[1] - 1 - GRID_BITS)


def rounding_cost(*, parameters: int, steps: int, delta: float) -> tuple[float, float]:
    """(epsilon, delta) to add to a campaign's for noise made of floats instead of real numbers.

    Two normals fall into one square of the grid. Moving them by at most `e` changes its probability by a share
    of at most 8 e / step: error times perimeter over area, on both sides. The error is ARITHMETIC_ERROR plus, at
    uniform u and radius r, RADIUS_RESOLUTION / (u r). Uniforms below some u1 are given up: they are part of
    delta. Above it, the logarithms of all shares are a martingale, bounded and of small variance, under either of
    two neighbouring cohorts; what it exceeds with a probability of the other half of delta is the
    epsilon.  [Freedman 1975] The delta returned is a hundredth of `delta`.
    """
    pairs = (parameters + 1) // 2 * steps
    spent = delta / 100
    u1 = min(spent / (2 * pairs), 0.5)
    r1 = math.sqrt(-2 * math.log(u1))
    share = 8 * 2.0 ** (GRID_BITS + 1)
    largest = 2 * share * (ARITHMETIC_ERROR + RADIUS_RESOLUTION / (u1 * r1))
    mean_square = 2 * share**2 * (ARITHMETIC_ERROR**2 + RADIUS_RESOLUTION**2 / (u1 * r1**2))
    variance = 4 * pairs * mean_square
    surprise = math.log(2 / spent)
    exceeded = math.sqrt(2 * variance * surprise) + 2 / 3 * largest * surprise
    return exceeded + variance + LARGEST_MU * math.sqrt(variance), spent


def noise_statement(*, parameters: int, steps: int, delta: float) -> str:
    """What a report says about the noise: where it comes from, what was done against its floats, what was not."""
    epsilon, spent = rounding_cost(parameters=parameters, steps=steps, delta=delta)
    return (
        "Noise: Gaussian, from an AES-256-CTR stream keyed by the operating system at every site that is not "
        f"simulated, followed to 10 standard deviations, enlarged by {SENSITIVITY_SLACK:.1%} for the rounding of "
        "sums (a bound up to 90 summed gradients a step, beyond that a thousand times the error measured), added in "
        "float64 and rounded to a public grid of about a thousandth of its deviation against attacks on "
        f"floating-point noise. What remains of that is at most epsilon {epsilon:.1g} and delta {spent:.1g} on top "
        f"of the stated ones ({parameters} parameters, {steps} steps). Not covered: the time that a step takes, the "
        "elementary functions of a GPU, and whoever can read the memory of a site's process."
    )
