"""How many critic steps precede a generator step, found while training.  [Bie et al. 2023, adaptive n_D]

A noised critic needs many steps before its slope says anything, and how many depends on the noise. The ladder
begins with one and climbs while the critic cannot tell fakes from anything: the moving average of its accuracy
on fakes stays at or below 0.6. Only generated volumes and the noised critic are looked at, so this is
post-processing and costs no privacy; the number of noised steps is the plan's, whatever the rung.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import IntegrityError

RUNGS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
MEMORY = 0.99  # of the moving average, per generator step
TOO_WEAK = 0.6  # accuracy on fakes at which a critic is no judge
GRACE = 200  # generator steps on a rung before its critic is judged, in runs of 10**5 steps; short runs need less
PREFIX = "ladder."


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Where a game stands. It is a value: `after` gives the next one.

    rung: index in RUNGS. average: moving average of the accuracy on fakes on this rung, begun at zero.
    seen: generator steps on this rung.
    """

    rung: int = 0
    average: float = 0.0
    seen: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rung < len(RUNGS):
            raise ValueError(f"rung must lie in 0..{len(RUNGS) - 1}, got {self.rung}")
        if not 0 <= self.average <= 1:
            raise ValueError(f"average must lie in [0, 1], got {self.average}")
        if self.seen < 0:
            raise ValueError(f"seen must be >= 0, got {self.seen}")

    @property
    def critic_steps(self) -> int:
        """Critic steps before the next generator step."""
        return RUNGS[self.rung]

    @property
    def accuracy(self) -> float:
        """The average without its bias towards zero; one half, a coin's, before anything was seen."""
        return self.average / (1 - MEMORY**self.seen) if self.seen else 0.5

    def after(self, accuracy_on_fakes: float, *, grace: int = GRACE) -> Ladder:
        """The ladder after one generator step, whose fakes the critic knew with this accuracy, in [0, 1].

        A climb forgets the rung below: the new number of critic steps is judged by itself, after its own grace.
        Raises ValueError for an accuracy outside [0, 1].
        """
        if not 0 <= accuracy_on_fakes <= 1:
            raise ValueError(f"accuracy must lie in [0, 1], got {accuracy_on_fakes}")
        average = MEMORY * self.average + (1 - MEMORY) * accuracy_on_fakes
        stayed = Ladder(rung=self.rung, average=min(average, 1.0), seen=self.seen + 1)
        if stayed.seen <= grace or stayed.accuracy > TOO_WEAK or stayed.rung == len(RUNGS) - 1:
            return stayed
        return Ladder(rung=self.rung + 1)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored between rounds, exactly."""
        return {
            f"{PREFIX}rung": torch.tensor(self.rung),
            f"{PREFIX}average": torch.tensor(self.average, dtype=torch.float64),
            f"{PREFIX}seen": torch.tensor(self.seen),
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Ladder:
        """Inverse of `tensors`, other names ignored. Raises IntegrityError when it is not there or not one."""
        try:
            rung, average, seen = (tensors[f"{PREFIX}{name}"].item() for name in ("rung", "average", "seen"))
            return cls(rung=int(rung), average=float(average), seen=int(seen))
        except (KeyError, ValueError, RuntimeError) as failure:
            raise IntegrityError(
                f"the stored ladder cannot be read ({failure}); nothing was trained. "
                "The site's state folder is damaged: restore it from its backup."
            ) from failure


def accuracy_on_fakes(scores: Tensor) -> float:
    """Share of generated volumes that the critic scores below zero, the boundary of hinge and non-saturating losses.

    scores: (B,) or (B, 1) of a fixed number of generated volumes, never of real ones. A score that is not finite
    counts as wrong.
    """
    if scores.numel() == 0:
        raise ValueError("accuracy needs at least one score")
    return math.fsum((scores.flatten() < 0).tolist()) / scores.numel()
