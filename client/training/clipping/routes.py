"""Which exact way gives the norms of one layer's per-patient weight gradients, and the ways themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from enum import StrEnum
from typing import assert_never

import torch
from torch import Tensor

from client.training.clipping.geometry import Geometry, Task

CHUNK_BYTES = 8 * 2**20  # copied at once by the Gram way: stays in the processor's cache
GRAM_MARGIN = 4.0  # in units of rounding; see `gram_squares`
GRAM_SHARE = 0.7  # Gram pays up to this share of the other way's multiplications: the ordinary gradient still follows
LOOP_PLACES = 2048  # from here on a call a patient is cheaper than one call with patients as groups


class Route(StrEnum):
    """grouped, looped: each patient's gradient is made and kept, and replaces the ordinary weight gradient.
    gram: only norms are made, and the ordinary weight gradient follows with scaled rows.
    """

    GROUPED = "grouped"
    LOOPED = "looped"
    GRAM = "gram"


def route_by_rule(task: Task) -> Route:
    """The route by arithmetic alone: a clock would pick by chance, and routes differ in their last bits."""
    if task.gram < GRAM_SHARE * task.made:
        return Route.GRAM
    return making_route(task)


def making_route(task: Task) -> Route:
    """The cheaper of the two routes that make the gradients."""
    return Route.LOOPED if task.places >= LOOP_PLACES else Route.GROUPED


def patient_gradients(route: Route, geometry: Geometry, x: Tensor, g: Tensor, patients: int) -> Tensor:
    """(patients, weights) by one of the two routes that make them."""
    match route:
        case Route.GROUPED:
            return by_chunks(
                geometry.by_patient, x, g, patients, copied=x.numel() + g.numel() + patients * math.prod(geometry.shape)
            )
        case Route.LOOPED:
            views = len(x) // patients
            rows = x.new_empty((patients, math.prod(geometry.shape)))
            for patient in range(patients):
                own = slice(patient * views, (patient + 1) * views)
                rows[patient] = geometry.total(x[own], g[own]).flatten()
            return rows
        case Route.GRAM:
            raise ValueError("the Gram route makes norms, not gradients; nothing was trained")
        case _:
            assert_never(route)


def gram_squares(geometry: Geometry, x: Tensor, g: Tensor, patients: int) -> Tensor:
    """(patients,) float64: ||sum_t g_t a_t^T||^2 = sum_st <a_s, a_t> <g_s, g_t>, without making the gradient.

    [Goodfellow 2015; Rochette et al. 2019]. Where the terms cancel, rounding could make the norm too small and the
    clip too weak; the norm is therefore raised by a few roundings of the uncancelled sum_t |a_t|^2 |g_t|^2, which is a
    few 1e-7 of it unless the terms do cancel.
    """
    return by_chunks(
        functools.partial(_gram_squares, geometry),
        x,
        g,
        patients,
        copied=patients * geometry.task(x, g, patients).copied,
    )


def _gram_squares(geometry: Geometry, x: Tensor, g: Tensor, patients: int) -> Tensor:
    a, b = geometry.inner_products(x, g, patients)
    inner = a * b
    margin = GRAM_MARGIN * torch.finfo(g.dtype).eps
    uncancelled = inner.diagonal(dim1=1, dim2=2).sum(dim=1, dtype=torch.float64)
    squares = inner.sum(dim=(1, 2), dtype=torch.float64).clamp(min=0.0) + margin * uncancelled
    return squares.view(patients, -1).sum(dim=1)


def by_chunks(
    function: Callable[[Tensor, Tensor, int], Tensor], x: Tensor, g: Tensor, patients: int, *, copied: int
) -> Tensor:
    """(patients, ...): the function on so few patients at a time that its copies stay small."""
    views = len(x) // patients
    chunks = max(1, round(copied * x.element_size() / CHUNK_BYTES))
    at_once = max(1, patients // chunks)
    if at_once >= patients:
        return function(x, g, patients)
    found: Tensor | None = None
    for first in range(0, patients, at_once):
        count = min(at_once, patients - first)
        own = slice(first * views, (first + count) * views)
        chunk = function(x[own], g[own], count)
        if found is None:
            found = chunk.new_empty((patients, *chunk.shape[1:]))
        found[first : first + count] = chunk
    return x.new_empty(0) if found is None else found
