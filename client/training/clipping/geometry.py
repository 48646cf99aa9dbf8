"""Weight gradients of one layer: for all rows at once, for each patient on its own, or only their norms.

Every layer here is linear in its weight and acts on rows alone. For a row with input a and output gradient g the weight
gradient is a sum of outer products over output places t: dW = sum_t g_t a_t^T, with a_t the input patch that place
t sees. Its squared norm is sum_st <a_s, a_t> <g_s, g_t>, which `inner_products` gives without making dW.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Task:
    """One layer's share of a pass, as far as the cost of a route depends on it."""

    patients: int
    places: int  # of one patient, over all views
    made: int  # multiplications to make one patient's gradient
    gram: int  # multiplications to get its norm from inner products
    copied: int  # numbers to copy for that


class Geometry(Protocol):
    """How a layer's weight meets its input.

    x: (rows, ...) inputs, g: (rows, ...) gradients of the outputs; rows are ordered by patient, equally many each.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""

    def task(self, x: Tensor, g: Tensor, patients: int) -> Task:
        """What the routes would cost."""

    def total(self, x: Tensor, g: Tensor) -> Tensor:
        """The weight's shape: gradient summed over all rows."""

    def by_patient(self, x: Tensor, g: Tensor, patients: int) -> Tensor:
        """(patients, weights): gradient of each patient, all in one call."""

    def inner_products(self, x: Tensor, g: Tensor, patients: int) -> tuple[Tensor, Tensor]:
        """(patients * groups, T, T): <a_s, a_t> and <g_s, g_t> of all pairs of a patient's places."""


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """Any zero-padded convolution in one to three dimensions, or its transpose."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed, self._extra, self.groups
        )

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient by x alone."""
        return self._backward(g, x, weight, groups=self.groups, mask=(True, False, False))[0]

    def task(self, x: Tensor, g: Tensor, patients: int) -> Task:
        """What the routes would cost."""
        seen, columns = self._roles(x, g)
        views = len(x) // patients
        places = views * math.prod(columns.shape[2:])
        patch, width = math.prod(self.shape[1:]), self.shape[0]
        grid = self._grid(columns)
        if grid is None:
            cells, depth = places, patch * self.groups
        else:
            cells, depth = views * math.prod(grid), seen.shape[1] * math.prod(self.stride)
        return Task(
            patients=patients,
            places=places,
            made=places * patch * width,
            gram=cells * cells * depth + places * places * width,
            copied=cells * depth,
        )

    def total(self, x: Tensor, g: Tensor) -> Tensor:
        """The weight's shape: gradient summed over all rows."""
        return self._backward(g, x, x.new_empty(()).expand(self.shape), groups=self.groups, mask=(False, True, False))[
            1
        ]

    def by_patient(self, x: Tensor, g: Tensor, patients: int) -> Tensor:
        """(patients, weights): the patients become groups of one wide convolution, their views its rows."""
        wide = (patients * self.shape[0], *self.shape[1:])
        gradient = self._backward(
            _side_by_side(g, patients),
            _side_by_side(x, patients),
            x.new_empty(()).expand(wide),
            groups=patients * self.groups,
            mask=(False, True, False),
        )[1]
        return gradient.reshape(patients, -1)

    def inner_products(self, x: Tensor, g: Tensor, patients: int) -> tuple[Tensor, Tensor]:
        """(patients * groups, T, T): <a_s, a_t> and <g_s, g_t> of all pairs of a patient's places."""
        seen, columns = self._roles(x, g)
        groups = columns.flatten(2).view(patients, -1, self.groups, self.shape[0] // self.groups, *columns.shape[2:])
        b = groups.flatten(4).permute(0, 2, 1, 4, 3).flatten(0, 1).flatten(1, 2)  # (patients * groups, T, n)
        return self._patch_products(seen, columns, patients), torch.bmm(b, b.mT)

    def _patch_products(self, seen: Tensor, columns: Tensor, patients: int) -> Tensor:
        grid = self._grid(columns)
        if grid is None:
            a = self._patches(seen, columns, patients)
            return torch.bmm(a, a.mT)
        return self._grid_products(seen, columns, patients, grid)

    def _patches(self, seen: Tensor, columns: Tensor, patients: int) -> Tensor:
        """(patients * groups, T, m): the patch that each place sees, channels innermost so that copies run long."""
        spatial = len(self.stride)
        padded = F.pad(seen, [p for p in reversed(self.padding) for _ in range(2)])
        windows = torch.unflatten(padded, 1, (self.groups, -1)).movedim((1, 2), (-2, -1)).contiguous()
        # groups and then channels are now innermost
        for axis, (kernel, stride, dilation) in enumerate(
            zip(self.shape[2:], self.stride, self.dilation, strict=True), start=1
        ):
            windows = windows.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
            windows = windows.narrow(axis, 0, columns.shape[axis + 1])  # output padding may add a window
        windows = torch.unflatten(windows, 0, (patients, -1))  # (patients, views, *T, G, C/G, *k)
        places, taps = range(2, 2 + spatial), range(4 + spatial, 4 + 2 * spatial)
        ordered = windows.permute(0, 2 + spatial, 1, *places, *taps, 3 + spatial)
        return ordered.flatten(0, 1).flatten(1, 1 + spatial).flatten(2)

    def _grid_products(self, seen: Tensor, columns: Tensor, patients: int, grid: tuple[int, ...]) -> Tensor:
        """The same from inner products of the input's own cells, a stride wide: patches overlap, cells do not.

        A patch is a block of cells, so <a_s, a_t> is the sum over d in the block of the products of cells s + d, t + d.
        """
        spatial, rows = len(grid), len(seen)
        cells = F.pad(seen, [p for p in reversed(self.padding) for _ in range(2)])
        for axis, (n, stride) in enumerate(zip(grid, self.stride, strict=True), start=2):
            cells = cells.narrow(axis, 0, n * stride)
        for axis, (n, stride) in enumerate(zip(grid, self.stride, strict=True)):
            cells = torch.unflatten(cells, 2 + 2 * axis, (n, stride))
        where, inside = range(2, 2 + 2 * spatial, 2), range(3, 3 + 2 * spatial, 2)
        z = cells.permute(0, *where, *inside, 1).reshape(patients, rows // patients * math.prod(grid), -1)
        products = torch.bmm(z, z.mT).view(patients, rows // patients, *grid, rows // patients, *grid)
        for axis, places in enumerate(columns.shape[2:]):
            first, second = 2 + axis, 3 + spatial + axis
            blocks = range(self.shape[2 + axis] // self.stride[axis])
            shifted = [products.narrow(first, d, places).narrow(second, d, places) for d in blocks]
            products = functools.reduce(torch.add, shifted)
        t = rows // patients * math.prod(columns.shape[2:])
        return products.reshape(patients, t, t)

    def _grid(self, columns: Tensor) -> tuple[int, ...] | None:
        """Cells along each axis where patches are blocks of whole cells and that is less work, else None."""
        if self.groups > 1 or any(d > 1 for d in self.dilation):
            return None
        if any(k % s for k, s in zip(self.shape[2:], self.stride, strict=True)):
            return None
        blocks = [k // s for k, s in zip(self.shape[2:], self.stride, strict=True)]
        grid = tuple(t + n - 1 for t, n in zip(columns.shape[2:], blocks, strict=True))
        return grid if math.prod(grid) ** 2 < math.prod(columns.shape[2:]) ** 2 * math.prod(blocks) else None

    def _roles(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What patches are cut from, and what has one column a place: the transpose swaps the two."""
        return (g, x) if self.transposed else (x, g)

    @property
    def _extra(self) -> tuple[int, ...]:
        return self.output_padding or (0,) * len(self.stride)

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, *, groups: int, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g, x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self._extra, groups, mask
        )
        return result


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear layer on the last axis; axes between rows and features are places."""

    shape: tuple[int, ...]

    def task(self, x: Tensor, g: Tensor, patients: int) -> Task:  # noqa: ARG002 - one signature for all layers
        """What the routes would cost."""
        out, features = self.shape
        places = x.numel() // (patients * features)
        return Task(
            patients=patients,
            places=places,
            made=places * features * out,
            gram=places * places * (features + out),
            copied=0,
        )

    def total(self, x: Tensor, g: Tensor) -> Tensor:
        """(out, in): gradient summed over all rows."""
        return g.reshape(-1, self.shape[0]).T @ x.reshape(-1, self.shape[1])

    def by_patient(self, x: Tensor, g: Tensor, patients: int) -> Tensor:
        """(patients, out * in): gradient of each patient."""
        a, b = self._factors(x, g, patients)
        return torch.bmm(b.mT, a).flatten(1)

    def inner_products(self, x: Tensor, g: Tensor, patients: int) -> tuple[Tensor, Tensor]:
        """(patients, T, T): <a_s, a_t> and <g_s, g_t> of all pairs of a patient's places."""
        a, b = self._factors(x, g, patients)
        if a.shape[1] == 1:  # a product of two long rows loses accuracy in float32, a norm in two levels does not
            return squares_of_rows(a[:, 0]).view(-1, 1, 1), squares_of_rows(b[:, 0]).view(-1, 1, 1)
        return torch.bmm(a, a.mT), torch.bmm(b, b.mT)

    def _factors(self, x: Tensor, g: Tensor, patients: int) -> tuple[Tensor, Tensor]:
        return x.reshape(patients, -1, self.shape[1]), g.reshape(patients, -1, self.shape[0])


def squares_of_rows(rows: Tensor) -> Tensor:
    """(B,) float64: squared L2 norm of each row of a (B, n) tensor.

    In two levels: a float32 sum over one long row falls short by up to 3e-5, and a norm too small is a clip too weak.
    """
    n = rows.shape[1]
    tail = n % 1024
    blocks = rows[:, : n - tail].reshape(len(rows), n // 1024, 1024)
    inner: Tensor = torch.linalg.vector_norm(blocks, dim=2).double().square().sum(dim=1)
    return inner + rows[:, n - tail :].double().square().sum(dim=1)


def _side_by_side(rows: Tensor, patients: int) -> Tensor:
    """(patients * views, C, ...) -> (views, patients * C, ...)."""
    return torch.unflatten(rows, 0, (patients, -1)).transpose(0, 1).flatten(1, 2)
