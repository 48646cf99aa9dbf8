"""The naive second implementation: one backward pass a patient, norms in float64. Shares no code with the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from client.training.clipping.part import Part


def patient_gradient(critic: nn.Module, views: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """(P,) float64: gradient of one patient's loss. views: (V, C, ...)."""
    parameters = list(critic.parameters())
    gradients = torch.autograd.grad(loss(critic(views).reshape(-1)), parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([g.flatten() for g in filled]).double()


def naive_sum(critic: nn.Module, parts: Sequence[Part], *, channels_last: bool = False) -> Tensor:
    """(P,) float64. channels_last: torch's kernels for that layout round differently, so compare like with like."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    total = torch.zeros(sum(p.numel() for p in critic.parameters()), dtype=torch.float64)
    for part in parts:
        rows = part.views.flatten(0, 1) if part.views_per_patient is None else part.views
        for views in rows.split(part.counts()):
            views = views.contiguous(memory_format=layouts.get(views.ndim, torch.contiguous_format))  # noqa: PLW2901
            gradient = patient_gradient(critic, views, part.loss)
            if part.clip_norm is not None:
                if not gradient.isfinite().all():
                    continue
                gradient = gradient * min(1.0, part.clip_norm / float(gradient.norm()))
            total += part.weight * gradient
    return total


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the whole vector; zero against zero is exact."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))
