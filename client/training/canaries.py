"""Canaries: gradients of nobody, put into the critic's steps to hear whether the promised noise is really there.

A canary is a direction of the critic's parameter space. A fair coin of the site, tossed before training, says whether
it takes part. One that does is drawn in each step by the very draw that draws patients, as a gradient CANARY_NORMS
times as long as the bound; it is clipped by the same function, added to the same sum, and noised with it. Then the
noised sum is all that is listened to: the running total of its inner product with each direction, in units of the
bound. Skipped clipping, missing or weak noise, a batch used again or drawn in another way all make those that took
part stand out more than the accountant allows.

What canaries change: nothing about the guarantee. Their coins, directions and draws depend on no patient, so for
every value of them the sum is a constant plus the patients' sum, and the noise hides a patient in it as well as
before: sensitivity, divisor, sampling and accounting stay as they are. They do not displace patients. The critic moves
a little along directions that nobody knows: beside noise in all of them, that is lost.

Directions are rows of an orthonormal cosine transform with random signs: exactly at right angles, so that canaries do
not disturb each other, spread over all parameters, and made when needed: a site keeps P signs instead of m x P
numbers. Signs and coins come from the site's own secret stream and never leave; nor does what was heard. What leaves
is how many guesses about the coins were right. That is a function of the noised sums, which training has paid
for, and of coins that are about nobody: it costs no budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct, idct
from torch import Tensor, nn

from client.randomness import SecureStream
from common.errors import IntegrityError, SettingsError
from common.measure.one_run import Guesses, GuessRule, guess
from common.settings.study import Study

CANARY_NORMS = (
    10.0  # length of a canary's gradient in clip norms: an engine that does not clip is heard ten times as loud
)
HEARD = "canaries.heard"  # name of the running totals among what a site keeps between rounds


@dataclass(frozen=True, kw_only=True, eq=False)
class Canaries:
    """The canaries of one site in one study.

    inside: (m,) whether each takes part. rows: (m,) which row of the transform each one is. signs: (P,) +-1.
    clip_norm: the study's bound, which lengths are measured in.
    """

    inside: NDArray[np.bool_]
    rows: NDArray[np.int64]
    signs: NDArray[np.float32]
    clip_norm: float

    @classmethod
    def make(cls, count: int, *, parameters: int, clip_norm: float, stream: SecureStream) -> Canaries:
        """`count` canaries for a critic with so many parameters; the same stream gives the same ones.

        Raises SettingsError for more canaries than parameters: that many right angles do not exist.
        """
        if count > parameters:
            raise SettingsError(
                f"audit.canaries: {count} canaries need as many directions, the critic has {parameters} parameters; "
                "nothing was trained. Lower audit.canaries, or raise training.critic_width."
            )
        return cls(
            inside=coins(count, stream),
            rows=stream.fork("rows").permutation(parameters)[:count],
            signs=np.where(stream.fork("signs").bernoulli(parameters, 0.5), 1.0, -1.0).astype(np.float32),
            clip_norm=clip_norm,
        )

    @property
    def takers(self) -> tuple[int, ...]:
        """Numbers of the canaries that take part."""
        return tuple(int(number) for number in np.flatnonzero(self.inside))

    def gradients(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """(n, P) float32: the gradients of these canaries, CANARY_NORMS clip norms long."""
        spectrum = np.zeros((len(numbers), len(self.signs)), dtype=np.float32)  # float64 takes thrice the time
        spectrum[np.arange(len(numbers)), self.rows[list(numbers)]] = CANARY_NORMS * self.clip_norm
        rows = idct(spectrum, norm="ortho", overwrite_x=True)
        return torch.from_numpy(np.multiply(rows, self.signs, out=rows)).to(device)

    def hear(self, noised: Tensor) -> Tensor:
        """(m,) float64: inner product of a step's noised sum (P,) with each direction, in clip norms."""
        flat = noised.detach().cpu().double().numpy()
        return torch.from_numpy(dct(flat * self.signs, norm="ortho")[self.rows] / self.clip_norm)


def canaries_of(study: Study, critic: nn.Module, stream: SecureStream) -> Canaries | None:
    """The study's canaries for its critic; None when it has none. Raises SettingsError as `Canaries.make` does."""
    if study.audit.canaries == 0:
        return None
    parameters = sum(p.numel() for p in critic.parameters())
    return Canaries.make(study.audit.canaries, parameters=parameters, clip_norm=study.privacy.clip_norm, stream=stream)


def coins(count: int, stream: SecureStream) -> NDArray[np.bool_]:
    """(count,) fair coins: which canaries take part. The stream's key decides, whatever was drawn from it before."""
    return stream.fork("coins").bernoulli(count, 0.5)


def heard_of(kept: Mapping[str, Tensor], count: int) -> Tensor:
    """(count,) float64: what training has left about the canaries. Raises IntegrityError when that is not there."""
    heard = kept.get(HEARD)
    if heard is None or heard.shape != (count,) or not heard.isfinite().all():
        raise IntegrityError(
            f"what was heard of {count} canaries is not in the stored state; nothing was trained or guessed. "
            "The site's state folder belongs to another study or is damaged: restore it from its backup."
        )
    return heard


def guesses(heard: Tensor, inside: NDArray[np.bool_], rules: Sequence[GuessRule]) -> tuple[Guesses, ...]:
    """Guess the coins from what was heard; for each rule the totals, which are all that may leave."""
    return tuple(guess(heard.tolist(), inside.tolist(), rule) for rule in rules)
