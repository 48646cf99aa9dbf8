"""The per-patient gradient: one patient's whole contribution is clipped once and the sum is noised once.

Correct before fast: gradients come from `torch.func.vmap(grad(...))` over patients, which is exact for any
critic without cross-record layers. Nothing here looks at how many patients were drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from client.randomness import SecureStream
from common.adversary.losses import fake_loss, real_loss
from common.settings.study import Loss

ROWS_AT_ONCE = 8  # patients whose gradients are computed together; bounds memory, never the result


def patient_gradients(critic: nn.Module, views: Tensor, loss: Loss, *, real: bool) -> Tensor:
    """(B, P) float32: gradient of each row's mean loss over its views, parameters flattened in order.

    views: (B, V, 1+K, D, H, W), V views of each of B patients (or of B generated volumes).
    """
    parameters = {name: p.detach() for name, p in critic.named_parameters()}
    if len(views) == 0:  # vmap takes no empty batch; a Poisson draw may well be one
        return torch.zeros((0, sum(p.numel() for p in parameters.values())), device=views.device)
    if not len(views):  # vmap has no empty case
        return views.new_zeros((0, sum(p.numel() for p in parameters.values())))
    equation = real_loss if real else fake_loss

    def row_loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        scores: Tensor = functional_call(critic, parameters, (row,))
        return equation(loss, scores)

    row_gradients = vmap(grad(row_loss), in_dims=(None, 0), chunk_size=ROWS_AT_ONCE)(parameters, views)
    return torch.cat([row_gradients[name].flatten(1) for name in parameters], dim=1)


def clip_rows(gradients: Tensor, clip_norm: float) -> Tensor:
    """Bound each row to L2 norm <= clip_norm.  [Abadi et al. 2016, Alg. 1]

    gradients: (B, P), one row per patient. A non-finite row becomes zero: a NaN that reached the
    sum would reveal that its patient was drawn.
    """
    finite = gradients.isfinite().all(dim=1, keepdim=True)  # (B, 1)
    rows = torch.where(finite, gradients, 0.0)
    # float64: a float32 norm over a long row falls short by up to 3e-5, which would exceed the bound.
    norms: Tensor = rows.double().norm(dim=1, keepdim=True)  # (B, 1)
    return rows * (clip_norm / norms).clamp(max=1.0).to(rows.dtype)  # a zero row stays zero


def noised_mean(
    clipped: Tensor, *, clip_norm: float, noise_multiplier: float, divisor: float, stream: SecureStream
) -> Tensor:
    """(P,): (sum of rows + N(0, (noise_multiplier * clip_norm)^2 I)) / divisor.  [Abadi et al. 2016, Alg. 1]

    clipped: (B, P) with row norms <= clip_norm; B may be 0, and an empty draw is noised like any
    other, or its absence would be visible. divisor: public constant, never the realised B.
    """
    total = clipped.sum(dim=0)
    if noise_multiplier > 0:
        noise = torch.from_numpy(stream.normal(total.numel())).to(total.device, total.dtype)
        total = total + noise_multiplier * clip_norm * noise
    return total / divisor


def assign_gradient(module: nn.Module, flat: Tensor) -> None:
    """Write a flat (P,) gradient into the parameters' `.grad`."""
    offset = 0
    for parameter in module.parameters():
        n = parameter.numel()
        parameter.grad = flat[offset : offset + n].view_as(parameter).clone()
        offset += n
