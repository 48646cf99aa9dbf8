"""From the sites' generators to one: screen, weighted mean, running average. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from common.generator.weights import Weights

# An update this many times longer than the median one is not used. All sites run the same plan from the
# same start, so honest updates differ in length by small factors (phantom and hippocampus runs: below 2);
# with fewer than three sites the median says nothing about who is wrong, so nobody is screened.
NORM_SCREEN_FACTOR: Final = 5.0
NORM_SCREEN_SITES: Final = 3


@dataclass(frozen=True, kw_only=True)
class Screened:
    """Sites that pass the norm screen, and those that do not with the ratio to the median."""

    kept: tuple[str, ...]
    excluded: Mapping[str, float]


def update_norm(start: Weights, end: Weights) -> float:
    """L2 norm of `end - start` over all arrays, in float64."""
    squares = [
        float(np.square(end.arrays[name].astype(np.float64) - start.arrays[name]).sum()) for name in start.arrays
    ]
    return math.sqrt(math.fsum(squares))


def screen(
    starts: Mapping[str, Weights], replies: Mapping[str, Weights], *, factor: float = NORM_SCREEN_FACTOR
) -> Screened:
    """Leave out a site whose update is more than `factor` times as long as the median update.

    starts: what each site was sent. It limits what one broken or hostile site can do to everybody's generator; it is no
    privacy measure.
    """
    if len(replies) < NORM_SCREEN_SITES:
        return Screened(kept=tuple(replies), excluded={})
    norms = {site: update_norm(starts[site], weights) for site, weights in replies.items()}
    middle = median(norms.values())
    # A zero median means that most sites changed nothing: no length to compare with.
    excluded = {site: norm / middle for site, norm in norms.items() if middle > 0 and norm > factor * middle}
    return Screened(kept=tuple(site for site in replies if site not in excluded), excluded=excluded)


def weighted_mean(replies: Mapping[str, Weights], site_weights: Mapping[str, float]) -> Weights:
    """sum_i p_i w_i / sum_i p_i over the sites that replied.  [McMahan et al. 2017, with public p_i]

    site_weights: public, agreed in the study; never a patient count that a site reports.
    Summed in float64 in the order of site names, so the order in which replies arrive changes no bit.
    Raises ValueError for no replies, a weight that is not positive, or shapes that differ.
    """
    if not replies:
        raise ValueError("no replies to average")
    sites = sorted(replies)
    if any(site_weights[site] <= 0 for site in sites):
        raise ValueError(f"site weights must be positive, got {dict(site_weights)}")
    shapes = replies[sites[0]].shapes
    if any(replies[site].shapes != shapes for site in sites):
        raise ValueError("replies differ in names or shapes of arrays")
    total = math.fsum(site_weights[site] for site in sites)
    mean = {}
    for name, shape in shapes.items():
        weighted_sum = np.zeros(shape, dtype=np.float64)
        for site in sites:
            weighted_sum += site_weights[site] * replies[site].arrays[name].astype(np.float64)
        mean[name] = (weighted_sum / total).astype(np.float32)
    return Weights(mean)


def moving_average(previous: Weights | None, current: Weights, decay: float) -> Weights:
    """Average over rounds, decay * previous + (1 - decay) * current; the first round starts it.

    It shadows the rounds and is never trained on; decay 0 keeps the last round's generator.
    """
    if previous is None or decay == 0:
        return current
    return Weights(
        {
            name: (decay * previous.arrays[name].astype(np.float64) + (1.0 - decay) * array).astype(np.float32)
            for name, array in current.arrays.items()
        }
    )
