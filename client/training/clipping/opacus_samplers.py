"""Our 3-D convolution kernels inside stock Opacus, for whoever uses Opacus' own engine without ours.

Registration is global in Opacus: it changes every later GradSampleModule of the process. So it is an explicit call,
and nothing in Consilium makes it.
"""

from __future__ import annotations

from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn
from torch.nn import functional as F

from client.training.clipping.geometry import Convolution, squares_of_rows
from client.training.clipping.routes import Route, gram_squares, making_route, patient_gradients, route_by_rule
from common.errors import SettingsError


def register_with_opacus() -> None:
    """Replace Opacus' grad sampler of Conv3d, and give its ghost mode the norm sampler of Conv3d that it lacks."""
    register_grad_sampler(nn.Conv3d)(conv3d_gradients)
    register_norm_sampler(nn.Conv3d)(conv3d_norms)


def conv3d_gradients(layer: nn.Conv3d, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Parameter -> (N, *shape): gradient of each row. activations: [(N, C, ...)], backprops: (N, O, ...)."""
    x, geometry = _seen(layer, activations[0])
    found: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        route = making_route(geometry.task(x, backprops, len(x)))
        rows = patient_gradients(route, geometry, x, backprops, len(x))
        found[layer.weight] = rows.view(-1, *layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops.sum(dim=(2, 3, 4))
    return found


def conv3d_norms(layer: nn.Conv3d, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Parameter -> (N,): L2 norm of each row's gradient."""
    x, geometry = _seen(layer, activations[0])
    found: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        task = geometry.task(x, backprops, len(x))
        if route_by_rule(task) is Route.GRAM:
            squares = gram_squares(geometry, x, backprops, len(x))
        else:
            squares = squares_of_rows(patient_gradients(making_route(task), geometry, x, backprops, len(x)))
        found[layer.weight] = squares.sqrt().to(x.dtype)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops.sum(dim=(2, 3, 4)).norm(dim=1)
    return found


def _seen(layer: nn.Conv3d, x: Tensor) -> tuple[Tensor, Convolution]:
    """The input as the kernel saw it. Opacus' own sampler takes every padding for zeros; here it is what it is."""
    before_after = layer._reversed_padding_repeated_twice
    padding: tuple[int, ...] = (0, 0, 0)
    if layer.padding_mode != "zeros":
        x = F.pad(x, before_after, mode=layer.padding_mode)
    elif isinstance(layer.padding, str):
        x = F.pad(x, before_after)
    else:
        padding = tuple(layer.padding)
    if x.ndim != 5:
        raise SettingsError(
            f"Conv3d saw rows of shape {tuple(x.shape[1:])}; nothing was trained. Give it (N, C, D, H, W)."
        )
    return x, Convolution(
        shape=tuple(layer.weight.shape),
        stride=tuple(layer.stride),
        padding=padding,
        dilation=tuple(layer.dilation),
        groups=layer.groups,
    )
