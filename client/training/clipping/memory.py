"""How many patients fit one pass, from a memory limit: seen on one public row, not measured on patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.training.clipping.engine import PatientClipper
from client.training.clipping.geometry import Task
from client.training.clipping.part import Part
from client.training.clipping.routes import Route, route_by_rule
from common.errors import SettingsError

WORKING_COPIES = 3.0  # of the largest activation: its gradient, the gradient before it, the kernels' own copies
PARAMETER_COPIES = 4.0  # weights in the rows' layout, their sum, the flat sum, its noise


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """Bytes of one pass above the critic and its optimiser: whatever is drawn, and for each patient in it."""

    fixed: float
    each: float


def patients_within(critic: nn.Module, view_shape: Sequence[int], *, views: int, limit_bytes: int) -> int:
    """Patients that one pass holds within `limit_bytes`, see `pass_memory`.

    Raises SettingsError when not even one patient fits.
    """
    needs = pass_memory(critic, view_shape, views=views)
    fit = int((limit_bytes - needs.fixed) // needs.each)
    if fit < 1:
        raise SettingsError(
            f"one patient's pass needs about {(needs.fixed + needs.each) / 2**20:.0f} MiB and "
            f"{limit_bytes / 2**20:.0f} MiB are allowed; nothing was trained. Allow more memory, or use fewer views, a "
            "smaller grid or a smaller critic."
        )
    return fit


def pass_memory(critic: nn.Module, view_shape: Sequence[int], *, views: int) -> PassMemory:
    """What one pass holds, an estimate from above for float32.

    view_shape: (C, D, H, W) of one view; views: of each patient. Counted are activations kept for backward, gradients
    made row by row, and working copies.
    """
    weights = {p.data_ptr() for p in critic.parameters()}
    activations: dict[int, int] = {}
    kept = 0

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in weights:
            activations[t.data_ptr()] = t.numel() * t.element_size()
        return t

    def route(task: Task) -> Route:
        nonlocal kept
        chosen = route_by_rule(task)
        if chosen is not Route.GRAM:
            kept += task.made // task.places * itemsize
        return chosen

    first = next(critic.parameters())
    itemsize = first.element_size()
    rows = torch.zeros((1, views, *view_shape), dtype=first.dtype, device=first.device)
    part = Part(views=rows, loss=torch.mean, clip_norm=1.0)
    clipper = PatientClipper(critic, route=route)
    clipper.clipped_sum([part])  # the first pass also tries the critic on rows of its own
    kept = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        clipper.clipped_sum([part])
    largest = max(activations.values(), default=0)
    each = sum(activations.values()) + kept + WORKING_COPIES * largest
    fixed = PARAMETER_COPIES * itemsize * sum(p.numel() for p in critic.parameters())
    return PassMemory(fixed=fixed, each=each)
