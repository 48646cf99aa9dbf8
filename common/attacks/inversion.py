"""White-box inversion: how closely can released weights be made to show this very patient?

A generator that memorised a patient holds a latent vector whose volume is that patient, however seldom sampling would
meet it. So the latent is searched for, from starts that the generator's own draws suggest, down the
gradient of a loss that reads fine structure, coarse grey values and labels. An easy scan is easy for every generator:
the same search in the public reference generator is subtracted. [Chen et al. 2020, white-box and calibrated]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.attacks.near_copy import STEPS as SHIFTS
from common.attacks.near_copy import moved_queries, moving_matrices, templates
from common.attacks.templates import centre_windows, pool, variants
from common.errors import DataError, UsageError
from common.generator.sampling import LatentToPairs, latents

STEPS = 10  # gradient steps; 50 explain scans a little better and tell members apart no better

_COARSE, _LABELS, _PRIOR = 0.5, 0.5, 1e-2  # weights beside the fine term, which has weight one
_LEARNING_RATE = 0.1  # of Adam, in standard deviations of the latent
_RIDGE = 1e-2  # of the start's regression, relative to the draws' mean squared feature
_DRAWS = 2048  # that the regression reads at most: its cost grows with their cube
_SEARCHED = 2  # of a scan's four starts
_UNMOVED = SHIFTS.index(0)
_EPSILON = 1e-6


class Inverter:
    """One generator, and where to start in it: latents that a regression on its draws guesses, and the nearest draws.

    generator: in evaluation mode on `device`, (N, L) -> (N, 1+K, D, H, W).
    pooled: (M, 1+K, 16, 16, 16), the generator's volumes 0 .. M-1 of the public `seed`, as `pooled_draws` gives them;
    the first 2,048 are read. steps: gradient steps for the better two of a scan's four starts, 0 for none.
    Raises UsageError for fewer volumes than latent dimensions, DataError for volumes that are not finite.
    """

    def __init__(
        self, generator: LatentToPairs, pooled: Tensor, *, seed: int, steps: int = STEPS, device: str = "cpu"
    ) -> None:
        pooled = pooled[:_DRAWS]
        if len(pooled) < generator.latent_size or steps < 0:
            raise UsageError(
                f"an inversion was asked for with {len(pooled)} volumes and {steps} steps; nothing was scored. "
                f"It needs at least {generator.latent_size} volumes, one a latent dimension, and no negative steps."
            )
        if not pooled.isfinite().all():
            raise DataError(
                f"the generator gave values that are not finite in {len(pooled)} volumes; nothing was scored. "
                "Its weights are damaged: take them from the run again."
            )
        self.channels = pooled.shape[1]
        self._generator, self._steps, self._device = generator, steps, device
        with torch.inference_mode(False):  # what gradients pass through must not be an inference tensor
            drawn = latents(seed, 0, len(pooled), generator.latent_size)
            self._starts = _Starts.fit(pooled.float().cpu().clone(), drawn, device)

    def residual(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Smallest loss found between the generator's volumes and a pair (1+K, D, H, W); 0 is the pair itself.

        own_copy: a pair of the same shape that counts as one more volume the generator can show.

        One scan at a time: in a common batch a convolution may round each volume's sums by its neighbours' number and
        place, and the score would no longer be a function of this scan alone.
        """
        with torch.inference_mode(False), torch.enable_grad():
            scan = scan.to(self._device).clone()
            target = _Target.of(scan)
            best = self._search(self._starts.of(scan, target.fine), target, scan.shape)
            if own_copy is not None:
                best = torch.minimum(best, target.loss(own_copy.to(self._device).clone()[None]).min())
        return float(best)

    def _search(self, starts: Tensor, target: _Target, shape: torch.Size) -> Tensor:
        """Smallest loss of any start (4, L) at any step, the prior left out; scalar."""
        with torch.no_grad():
            pairs = self._generator(starts)
            if pairs.shape[1:] != shape:
                raise UsageError(
                    f"the generator makes pairs of shape {tuple(pairs.shape[1:])}, the scan has {tuple(shape)}; it was "
                    "not scored. Use the generator of this study."
                )
            losses = target.loss(pairs)  # (4,)
            best, better = losses.min(), losses.topk(_SEARCHED, largest=False).indices
        z = starts[better].requires_grad_()
        optimiser = torch.optim.Adam([z], lr=_LEARNING_RATE)
        for _ in range(self._steps):
            losses = target.loss(self._generator(z))
            best = torch.minimum(best, losses.detach().min())
            (gradient,) = torch.autograd.grad((losses + _PRIOR * _unlikely(z)).sum(), z)
            z.grad = gradient.nan_to_num(0, 0, 0)  # a flat volume has no direction in which it is less flat
            optimiser.step()
        with torch.no_grad():
            return torch.minimum(best, target.loss(self._generator(z)).min())


class Inversion:
    """Raw score of one scan: what is left of it under the reference generator minus what is left under the candidate.

    candidate, reference: inverters with the same number of steps; the reference is public, the start of training.
    Raises UsageError when the two make different pairs.
    """

    def __init__(self, candidate: Inverter, reference: Inverter) -> None:
        if candidate.channels != reference.channels:
            raise UsageError(
                f"the candidate makes {candidate.channels} channels, the reference {reference.channels}; nothing was "
                "scored. Both must be generators of this study."
            )
        self._candidate, self._reference = candidate, reference

    def raw(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score of a pair (1+K, D, H, W), as if the candidate could show `own_copy` of the same shape too."""
        return self._reference.residual(scan) - self._candidate.residual(scan, own_copy)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Target:
    """One scan under every shift and mirror image, ready to be compared with generated volumes.

    fine (250, 2744), coarse (54, 343): rows of length one; labels (K, 54, 343) occupancies.
    Each term takes the variant that suits it best.
    """

    fine: Tensor
    coarse: Tensor
    labels: Tensor

    @staticmethod
    def of(scan: Tensor) -> _Target:
        coarse, labels = _coarse(variants(pool(scan[None])[0]))
        return _Target(fine=moved_queries(scan[0]), coarse=coarse, labels=labels)

    def loss(self, pairs: Tensor) -> Tensor:
        """(S, 1+K, D, H, W) -> (S,): 0 for a volume that some shift or mirror image of the scan equals."""
        pooled = _pool(pairs)
        coarse, labels = _coarse(centre_windows(pooled))
        fine_term = 1 - (self.fine @ templates(pooled).T).amax(dim=0)
        coarse_term = 1 - (self.coarse @ coarse.T).amax(dim=0)
        overlap = 2 * self.labels @ labels.transpose(1, 2)  # (K, 54, S)
        sizes = self.labels.square().sum(dim=2)[:, :, None] + labels.square().sum(dim=2)[:, None]
        label_term = 1 - ((overlap + _EPSILON) / (sizes + _EPSILON)).mean(dim=0).amax(dim=0)  # [Milletari et al. 2016]
        return fine_term + _COARSE * coarse_term + _LABELS * label_term


@dataclass(frozen=True, kw_only=True, eq=False)
class _Starts:
    """Latents to start from, learnt from M public draws.

    Two come from a ridge regression from what a pooled pair shows to the latent that made it, for the scan and its
    mirror image: on the studies' generators it explains 98 % of the latent's variance, a two-layer network trained ten
    times as long no more. Two are those of the draws most like the scan: a regression cannot know of a memory that
    lies apart, and an inversion should never see less than sampling does.
    """

    centre: Tensor  # (F,)
    weights: Tensor  # (F, L)
    fine: Tensor  # (M, 2744)
    drawn: Tensor  # (M, L)

    @staticmethod
    def fit(pooled: Tensor, drawn: Tensor, device: str) -> _Starts:
        """From pooled (M, 1+K, 16, 16, 16) and drawn (M, L), solved in the M dimensions of the draws."""
        features = _start_features(pooled)  # (M, F)
        centre = features.mean(dim=0)
        centred = features - centre
        gram = (centred @ centred.T).double()
        ridge = _RIDGE * gram.diagonal().mean() + _EPSILON
        dual = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), drawn.double())
        return _Starts(
            centre=centre.to(device),
            weights=(centred.T @ dual.float()).to(device),
            fine=templates(pooled).to(device),
            drawn=drawn.to(device),
        )

    def of(self, scan: Tensor, queries: Tensor) -> Tensor:
        """A pair (1+K, D, H, W) and its fine queries (250, 2744) -> (4, L)."""
        both = torch.stack([scan, scan.flip(1)])  # axis i is left-right in RAS+
        guessed = (_start_features(pool(both)) - self.centre) @ self.weights
        nearest = (queries @ self.fine.T).amax(dim=0).topk(2).indices
        return torch.cat([guessed, self.drawn[nearest]])


def _start_features(pooled: Tensor) -> Tensor:
    """(N, 1+K, 16, 16, 16) -> (N, F): fine structure, and coarse grey values and labels, about equally loud."""
    coarse, labels = _coarse(centre_windows(pooled))
    return torch.cat([templates(pooled), coarse, *labels], dim=1)


def _coarse(windows: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1+K, 14, 14, 14) -> grey values (N, 343), mean zero and length one, and occupancies (K, N, 343)."""
    halved = F.avg_pool3d(windows, 2).flatten(2)
    image = halved[:, 0] - halved[:, 0].mean(dim=1, keepdim=True)
    length = image.norm(dim=1, keepdim=True).clamp(min=_EPSILON)
    return image / length, halved[:, 1:].transpose(0, 1)


def _pool(pairs: Tensor) -> Tensor:
    """`pool` as three small products, (N, C, D, H, W) -> (N, C, 16, 16, 16): its gradient costs a tenth."""
    i, j, k = (moving_matrices(n)[_UNMOVED].to(pairs.device).clone() for n in pairs.shape[2:])
    pooled: Tensor = torch.einsum("ncijk,ai,bj,dk->ncabd", pairs, i, j, k)
    return pooled


def _unlikely(z: Tensor) -> Tensor:
    """(N, L) -> (N,): squared distance of the squared length from its mean under the latent's normal, relative."""
    return (z.square().mean(dim=1) - 1).square()
