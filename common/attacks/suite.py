"""The attacks of a plan against one generator, in their public unit, and the one score that was named primary before.

0 lies 2.5 robust standard deviations below the middle score of fresh volumes of the public start, 1 as far above that
of fresh volumes of the candidate generator. Medians: a generator that repeats a few volumes must not stretch its own
yardstick. All of it is post-processing of public weights: no patient, member or not, sets a scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from common.attacks.attack import Attack
from common.attacks.density_ratio import DensityRatio
from common.attacks.inversion import Inversion, Inverter
from common.attacks.label_size import LabelSize
from common.attacks.near_copy import NearCopy, templates
from common.attacks.nearest import Nearest
from common.attacks.substitute import Substitute
from common.attacks.templates import pool, pooled_draws
from common.attacks.threads import one_thread_each
from common.errors import DataError, PolicyRefusal
from common.generator.sampling import LatentToPairs, sample_pairs
from common.measure.audit_plan import AuditPlan, Endpoint
from common.settings.study import AttackName

_SPREADS = 2.5  # robust standard deviations from the middle of public scores to the ends of the unit
_ALIKE = 1e-5  # public scores that vary less than this (raw unit) say that all volumes are one
_ONE_VOLUME = 0.9  # correlation between half of the pairs of volumes
_SUBSTITUTE_WEIGHT = 0.25
_REACH = 2.0  # what one attack may add to the fused score, from -1 to this: an outlier must not drown the others


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The two raw scores that become 0 and 1; NaN when the public volumes are all alike."""

    zero: float
    one: float

    def of(self, raw: float) -> float:
        """Score in the public unit; NaN when there is no unit or the score is not a number."""
        return (raw - self.zero) / (self.one - self.zero)


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """Every attack of a plan, ready to score scans. `near_copy` and `label_size` are also there on their own.

    units: of every attack, and of the fused score.
    """

    attacks: Mapping[AttackName, Attack]
    units: Mapping[AttackName, Unit]
    fused: Unit
    near_copy: NearCopy
    label_size: LabelSize

    def scores(self, scan: Tensor, own_copy: Tensor | None = None) -> dict[Endpoint, float]:
        """Every endpoint's score of a pair (1+K, D, H, W) float32, in the public unit; NaN where there is none."""
        raw = {name: attack.raw(scan, own_copy) for name, attack in self.attacks.items()}
        each = {name: self.units[name].of(value) for name, value in raw.items()}
        found = {Endpoint.FUSED: self.fused.of(fuse(each)), Endpoint.NEAR_COPY: each[AttackName.NEAR_COPY]}
        if AttackName.INVERSION in each:
            found[Endpoint.INVERSION] = each[AttackName.INVERSION]
        return found


def fuse(scores: Mapping[AttackName, float]) -> float:
    """Weighted mean of the attacks' scores in their public units, each cut to -1 .. 2; NaN if any is.

    Weights are fixed before any score exists: fitted on members they would be one more use of their data. The
    substitute classifier counts less, because single copies do not move it (docs/decisions/0015).
    """
    if any(map(math.isnan, scores.values())):
        return math.nan
    weights = {name: _SUBSTITUTE_WEIGHT if name is AttackName.SUBSTITUTE else 1.0 for name in scores}
    cut = {name: min(max(score, -1.0), _REACH) for name, score in scores.items()}
    return math.fsum(weights[name] * cut[name] for name in scores) / math.fsum(weights.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What attacks read of one side, candidate or public start.

    pooled: (M, 1+K, 16, 16, 16). fresh: (N, 1+K, D, H, W) further volumes, for the unit. generator: in evaluation mode;
    None where there are only volumes, and nothing to invert. seed: public, of the latents of `pooled`.
    """

    pooled: Tensor
    fresh: Tensor
    generator: LatentToPairs | None = None
    seed: int = 0
    device: str = "cpu"

    @classmethod
    def drawn(cls, generator: LatentToPairs, *, seed: int, count: int, fresh: int, device: str = "cpu") -> Material:
        """Volumes 0 .. count + fresh - 1 of a generator; only one batch of the first is at full size at a time."""
        return cls(
            pooled=pooled_draws(generator, seed=seed, first=0, count=count, device=device),
            fresh=torch.from_numpy(sample_pairs(generator, seed=seed, first=count, count=fresh, device=device)),
            generator=generator,
            seed=seed,
            device=device,
        )

    def inverter(self, steps: int) -> Inverter:
        """Raises DataError without a generator."""
        if self.generator is None:
            raise DataError("the plan has an inversion attack, and there are no generator weights; nothing was scored.")
        return Inverter(self.generator, self.pooled, seed=self.seed, steps=steps, device=self.device)


def build_suite(
    *, candidate: Material, start: Material, plan: AuditPlan, consented: Sequence[Tensor] | None = None
) -> Suite:
    """The plan's attacks on the candidate; a pure function of public weights or volumes and the plan.

    start: of the public generator. consented: full-resolution pairs (1+K, D, H, W) of people who allowed it, or public
    ones; needed by density ratio and substitute. Raises PolicyRefusal or DataError for an attack without its material.
    """
    near_copy = NearCopy(candidate.pooled, start.pooled)
    allowed = pool(torch.stack(list(consented))) if consented else None

    def attack(name: AttackName) -> Attack:
        match name:
            case AttackName.NEAR_COPY:
                return near_copy
            case AttackName.NEAREST:
                return Nearest(candidate.pooled, start.pooled)
            case AttackName.INVERSION:
                return Inversion(candidate.inverter(plan.inversion_steps), start.inverter(plan.inversion_steps))
            case AttackName.DENSITY_RATIO:
                return DensityRatio(candidate.pooled, _needed(allowed, name))
            case AttackName.SUBSTITUTE:
                return Substitute(candidate.pooled, _needed(allowed, name))
            case _:
                assert_never(name)

    attacks = {name: attack(name) for name in plan.attacks}

    @torch.no_grad()
    def raw(volume: Tensor) -> dict[AttackName, float]:
        return {name: each.raw(volume) for name, each in attacks.items()}

    lows, highs = (list(one_thread_each(raw, list(side.fresh))) for side in (start, candidate))
    return _suite(
        attacks, lows, highs, fresh=candidate.fresh, near_copy=near_copy, label_size=LabelSize(candidate.pooled)
    )


def build_suite_alone(*, pooled: Tensor, fresh: Tensor, others: Tensor) -> Suite:
    """Near copy and nearest, for synthetic volumes beside which there is nothing public: nothing is subtracted.

    The unit comes from `fresh`, some of the volumes: 0 lies at the low end of how like any of the others each of them
    is, 1 at the high end of how like the most similar of the others.

    pooled: (M, 1+K, 16, 16, 16) all volumes. fresh: (N, 1+K, D, H, W) N of them. others: the rest, pooled.
    """
    near_copy = NearCopy(pooled, None)
    attacks: dict[AttackName, Attack] = {
        AttackName.NEAR_COPY: near_copy,
        AttackName.NEAREST: Nearest(pooled, None),
    }
    similar, close = NearCopy(others, None), Nearest(others, None)
    lows = [{AttackName.NEAR_COPY: similar.usual(volume), AttackName.NEAREST: close.usual(volume)} for volume in fresh]
    highs = [{AttackName.NEAR_COPY: similar.raw(volume), AttackName.NEAREST: close.raw(volume)} for volume in fresh]
    return _suite(attacks, lows, highs, fresh=fresh, near_copy=near_copy, label_size=LabelSize(pooled))


def _suite(
    attacks: Mapping[AttackName, Attack],
    lows: Sequence[Mapping[AttackName, float]],
    highs: Sequence[Mapping[AttackName, float]],
    *,
    fresh: Tensor,
    near_copy: NearCopy,
    label_size: LabelSize,
) -> Suite:
    """The attacks in units whose ends come from raw scores at the low and at the high end.

    fresh: (N, 1+K, D, H, W) volumes that are attacked; if they are all one, there is no unit.
    """
    none = Unit(zero=math.nan, one=math.nan)
    one_volume = collapsed(fresh)
    units = {name: none if one_volume else _unit([s[name] for s in lows], [s[name] for s in highs]) for name in attacks}
    low_fused, high_fused = (
        [fuse({name: units[name].of(value) for name, value in s.items()}) for s in scores] for scores in (lows, highs)
    )
    return Suite(
        attacks=attacks,
        units=units,
        fused=none if one_volume else _unit(low_fused, high_fused),
        near_copy=near_copy,
        label_size=label_size,
    )


def collapsed(volumes: Tensor) -> bool:
    """Whether (N, 1+K, D, H, W) volumes are one volume again and again, also under a little noise.

    The median correlation of fine structure between two of them: 0.2 to 0.5 for phantoms and for trained generators,
    0.93 and more for one volume with noise of up to 0.2 on a range of 2. Half the pairs must be alike: a generator
    that remembers a handful of patients is no single volume, and has to be shown as the leak it is.
    """
    rows = templates(pool(volumes))
    return float((rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)].median()) > _ONE_VOLUME


def _needed(consented: Tensor | None, name: AttackName) -> Tensor:
    if consented is None:
        raise PolicyRefusal(
            f"the plan's attack {name.value} compares with scans of people who are not in question, and this site has "
            "no `reference_set`; nothing was scored. Configure one in site.yaml, or leave the attack out of the study."
        )
    return consented


def _unit(lows: Sequence[float], highs: Sequence[float]) -> Unit:
    """Ends of the unit from scores of fresh reference and of fresh candidate volumes."""
    (low, low_spread), (high, high_spread) = _middle(lows), _middle(highs)
    zero, one = low - _SPREADS * low_spread, high + _SPREADS * high_spread
    # One volume again and again would still have a score for everybody; it must not look like a measurement.
    usable = min(low_spread, high_spread) > _ALIKE and one - zero > _ALIKE
    return Unit(zero=zero if usable else math.nan, one=one if usable else math.nan)


def _middle(scores: Sequence[float]) -> tuple[float, float]:
    """Median, and median absolute deviation scaled to a normal's standard deviation."""
    values = np.array(scores)
    median = float(np.median(values))
    return median, 1.4826 * float(np.median(np.abs(values - median)))
