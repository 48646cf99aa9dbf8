"""Substitute classifier: what would a critic that tells synthetic from reference volumes say about this scan?

The released generator comes without its critic, so one is fitted to its volumes. Members pull synthetic volumes
towards themselves, and with them the side of the boundary on which they lie. [Hayes et al. 2019, LOGAN black-box]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.attacks.density_ratio import require_reference
from common.attacks.features import DIMENSIONS, Embedding, views
from common.attacks.templates import pool

FOLDS = 5

_COEFFICIENT_VARIANCE = 10.0  # of the coefficients' normal prior; 1 sees half as many shifted copies on phantoms
_NEWTON_STEPS = 25  # a handful reach rounding
_SMALLEST_STEP = 2**-20  # of Newton's: a loss that falls no more is at its minimum


class Substitute:
    """Raw score of one scan: logit of "synthetic" from logistic regressions on whitened components and their squares.

    One regression for every fifth of the reference set left out; a scan's score is the mean logit of the five at the
    shift and mirror image where it is largest. A reference volume's own score comes from the one that left it out.

    synthetic (M, 1+K, 16, 16, 16), reference (R, 1+K, 16, 16, 16): pooled pairs; the reference is public or consented.
    Raises DataError for fewer of either than dimensions.
    """

    def __init__(self, synthetic: Tensor, reference: Tensor, *, dimensions: int = DIMENSIONS) -> None:
        require_reference(reference, dimensions)
        self._embedding = Embedding.fit(synthetic, dimensions)
        inside, outside = _terms(self._embedding(synthetic)), _terms(self._embedding(reference))
        fold = torch.arange(len(reference)) % FOLDS
        self._models = [_Logistic.fit(inside, outside[fold != left_out]) for left_out in range(FOLDS)]

    def raw(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score of a pair (1+K, D, H, W), as if the regressions had been fitted to `own_copy` too.

        A single volume hardly moves a boundary drawn between thousands: this attack sees what many copies have in
        common, and a control of single planted copies says so by not being caught.
        """
        terms = _terms(self._embedding(views(scan)))
        copy = None if own_copy is None else _terms(self._embedding(pool(own_copy[None])))[0]
        return float(torch.stack([model.logits(terms, copy) for model in self._models]).mean(dim=0).max())

    def reference_raw(self, number: int, scan: Tensor) -> float:
        """Score of reference volume `number`, at full resolution (1+K, D, H, W), out of fold."""
        return float(self._models[number % FOLDS].logits(_terms(self._embedding(views(scan))), None).max())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Logistic:
    """A fitted regression: coefficients (T,), inverse Hessian of its loss (T, T), weight of a synthetic volume."""

    coefficients: Tensor
    inverse_hessian: Tensor
    synthetic_weight: float

    @staticmethod
    def fit(synthetic: Tensor, reference: Tensor) -> _Logistic:
        """Newton's method on the logistic loss with a normal prior, terms (M, T) and (R, T); classes weigh the same."""
        x = torch.cat([synthetic, reference])
        y = torch.cat([torch.ones(len(synthetic)), torch.zeros(len(reference))]).double()
        share = len(reference) / len(synthetic)
        weight = torch.where(y == 1, share, 1.0)
        precision = torch.eye(x.shape[1], dtype=torch.float64) / _COEFFICIENT_VARIANCE
        beta = torch.zeros(x.shape[1], dtype=torch.float64)

        def loss(at: Tensor) -> Tensor:
            logits = x @ at
            return (weight * (F.softplus(logits) - y * logits)).sum() + 0.5 * at @ precision @ at

        for _ in range(_NEWTON_STEPS):
            p = (x @ beta).sigmoid()
            gradient = x.T @ (weight * (p - y)) + precision @ beta
            hessian = (x.T * (weight * p * (1 - p))) @ x + precision
            step = torch.linalg.solve(hessian, gradient)
            # Where the classes lie far apart a whole step overshoots and the next is longer still.
            size, before = 1.0, loss(beta)
            while size > _SMALLEST_STEP and not loss(beta - size * step) < before:
                size /= 2
            if size <= _SMALLEST_STEP:
                break
            beta = beta - size * step
        return _Logistic(coefficients=beta, inverse_hessian=torch.linalg.inv(hessian), synthetic_weight=share)

    def logits(self, terms: Tensor, own_copy: Tensor | None) -> Tensor:
        """(Q, T) -> (Q,), after one Newton step towards the loss that also holds `own_copy` (T,) as synthetic."""
        beta = self.coefficients
        if own_copy is not None:
            pull = self.synthetic_weight * (1 - (own_copy @ beta).sigmoid())
            beta = beta + pull * (self.inverse_hessian @ own_copy)
        return terms @ beta


def _terms(components: Tensor) -> Tensor:
    """(N, d) -> (N, 2d+1) float64: components, their squares less one, a constant."""
    constant = torch.ones(len(components), 1, dtype=torch.float64)
    z = components.double()
    return torch.cat([z, z.square() - 1, constant], dim=1)
