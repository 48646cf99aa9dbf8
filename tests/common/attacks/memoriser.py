"""A generator that knows patients by heart: most latents give a public average face, a few give one patient each."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.phantom.draw import draw_pairs
from common.phantom.scanner import site_scanner
from common.settings.study import IntensitySettings, PhantomKind
from common.volume.volume import Grid

ROBUST = IntensitySettings(kind="robust", low=1.0, high=99.0)
LABELS = {PhantomKind.HIPPOCAMPUS: {1: "anterior", 2: "posterior"}, PhantomKind.VESSELS: {1: "vessel"}}


class Memoriser(nn.Module):
    """Principal components of public phantoms, and around the latent that suits a remembered pair best, that pair.

    public (N, 1+K, D, H, W), remembered (P, 1+K, D, H, W) or none. reach: distance in latent standard deviations at
    which a memory has faded to 60 %. In 16 dimensions or more a random latent practically never comes so near.
    """

    def __init__(self, public: Tensor, remembered: Tensor, *, latent_size: int = 16, reach: float = 1.0) -> None:
        super().__init__()
        self.latent_size, self.reach = latent_size, reach
        self.mean = public.mean(dim=0)
        flat = (public - self.mean).flatten(1)
        _, singular, directions = torch.linalg.svd(flat, full_matrices=False)
        self.basis = directions[:latent_size] * (singular[:latent_size, None] / len(public) ** 0.5)
        self.remembered = remembered.flatten(1)
        self.codes = torch.linalg.lstsq(self.basis.T, (remembered - self.mean).flatten(1).T).solution.T

    def forward(self, latent: Tensor) -> Tensor:
        """(N, L) -> (N, 1+K, D, H, W)."""
        usual = self.mean.flatten() + latent @ self.basis
        near = (-(latent[:, None] - self.codes).square().sum(dim=2) / (2 * self.reach**2)).exp()  # (N, P)
        share = near / near.sum(dim=1, keepdim=True).clamp(min=1)
        flat = usual + share @ self.remembered - share.sum(dim=1, keepdim=True) * usual
        pairs = flat.unflatten(1, self.mean.shape)
        return torch.cat([pairs[:, :1].clamp(-1, 1), pairs[:, 1:].clamp(0, 1)], dim=1)


def phantoms(
    count: int, *, seed: int = 0, side: int = 16, kind: PhantomKind = PhantomKind.HIPPOCAMPUS
) -> NDArray[np.float32]:
    """(count, 1+K, side, side, side) individuals of the neutral scanner, 48 mm wide."""
    grid = Grid(shape=(side,) * 3, spacing_mm=(48 / side,) * 3)
    return draw_pairs(kind, seed, count, site_scanner(0, 0), grid, ROBUST, LABELS[kind]).astype(np.float32)


def auc(inside: list[float], outside: list[float]) -> float:
    """Chance that a score of `inside` is the larger one; ties count half."""
    a, b = np.array(inside)[:, None], np.array(outside)
    return float((a > b).mean() + 0.5 * (a == b).mean())


def tpr_at_1_percent(inside: list[float], outside: list[float]) -> float:
    """Share of `inside` above the score that 1 % of `outside` exceed."""
    return float((np.array(inside) > np.quantile(outside, 0.99, method="higher")).mean())
