"""One pass's books: what each layer saw, the patients' norms, and the weighted sum of their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from client.training.clipping.geometry import Geometry, Task, squares_of_rows
from client.training.clipping.routes import Route, gram_squares, making_route, patient_gradients


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring clipped patients with equally many views."""

    first_row: int
    first_patient: int
    patients: int
    views: int

    @property
    def rows(self) -> slice:
        """Where their rows are."""
        return slice(self.first_row, self.first_row + self.patients * self.views)


class Target(Protocol):
    """The parameters behind a layer's effective weight."""

    @property
    def is_the_parameter(self) -> bool:
        """Whether the effective weight is itself one parameter, so that the norms of both gradients are the same."""

    @property
    def numbers(self) -> Sequence[int]:
        """The parameters' numbers."""

    def pull_back(self, rows: Tensor) -> Sequence[tuple[int, Tensor]]:
        """(B, weights) gradients by the effective weight -> number and (B, n) gradient of each parameter."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Gradients that were made one by one. patients: (B, n); public: (n,), the sum over public rows."""

    number: int
    patients: Tensor
    public: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a layer saw, kept until the clip factors are known."""

    target: Target
    geometry: Geometry
    x: Tensor
    g: Tensor


class Book:
    """Written by the layers during backward, in any order, then closed by `sums`.

    segments: the clipped patients, whose rows come first. rows: all rows of the pass; those after the last segment
    are public and enter every sum with factor one.
    """

    def __init__(
        self, segments: Sequence[Segment], rows: int, route: Callable[[Task], Route], device: torch.device
    ) -> None:
        self._segments = segments
        self._rows = rows
        self._route = route
        self._clipped = sum(s.patients * s.views for s in segments)
        self._kept: list[Kept] = []
        self._pairs: list[Pair] = []
        self._squares = torch.zeros(sum(s.patients for s in segments), dtype=torch.float64, device=device)

    def vector(self, number: int, rows: Tensor) -> None:
        """A small parameter's gradient, made row by row. rows: (rows, n)."""
        rows = _single(rows)
        own = [rows[s.rows].view(s.patients, s.views, -1).sum(dim=1) for s in self._segments]
        public = rows[self._clipped :].sum(dim=0) if self._clipped < self._rows else None
        self._keep(Kept(number=number, patients=torch.cat(own) if own else rows[:0], public=public))

    def weight(self, target: Target, geometry: Geometry, x: Tensor, g: Tensor) -> None:
        """A weight, by its layer's input and the gradient of its output, (rows, ...) each."""
        tasks = [geometry.task(x[s.rows], g[s.rows], s.patients) for s in self._segments]
        routes = [self._route(task) for task in tasks]
        if target.is_the_parameter and all(route is Route.GRAM for route in routes):  # also when all rows are public
            for s in self._segments:
                squares = gram_squares(geometry, _single(x[s.rows]), _single(g[s.rows]), s.patients)
                self._add(s.first_patient, squares)
            self._pairs.append(Pair(target=target, geometry=geometry, x=x.detach(), g=g))
            return
        made = [
            patient_gradients(
                making_route(task) if route is Route.GRAM else route,
                geometry,
                _single(x[s.rows]),
                _single(g[s.rows]),
                s.patients,
            )
            for task, route, s in zip(tasks, routes, self._segments, strict=True)
        ]
        none = torch.zeros((0, math.prod(geometry.shape)), dtype=_single(g[:0]).dtype, device=g.device)
        patients = made[0] if len(made) == 1 else torch.cat([none, *made])
        public = None
        if self._clipped < self._rows:
            public = geometry.total(_single(x[self._clipped :]), _single(g[self._clipped :])).reshape(1, -1)
        pulled = target.pull_back(patients)
        public_parts = [None] * len(pulled) if public is None else [p[0] for _, p in target.pull_back(public)]
        for (number, rows), own in zip(pulled, public_parts, strict=True):
            self._keep(Kept(number=number, patients=rows, public=own))

    @torch.no_grad()  # what a layer saw still hangs on the critic's graph
    def sums(self, clip_norms: Tensor, weights: Tensor) -> dict[int, Tensor]:
        """Parameter number -> (n,): the weighted sum of clipped patients, plus public rows.

        [Abadi et al. 2016, Alg. 1]. clip_norms, weights: (patients,) float64, in the order of the segments.
        """
        factors = clip_factors(self._squares, clip_norms) * weights  # (patients,) float64
        finite = self._squares.isfinite()
        if not bool(finite.all()):
            self._drop(~finite)
        by_row = torch.ones(self._rows, dtype=torch.float64, device=factors.device)
        for s in self._segments:
            own = factors[s.first_patient : s.first_patient + s.patients]
            by_row[s.rows] = own.repeat_interleave(s.views)
        found: dict[int, Tensor] = {}
        for kept in self._kept:
            total = factors.to(kept.patients) @ kept.patients
            found[kept.number] = total if kept.public is None else total.add_(kept.public)
        for pair in self._pairs:
            g, x = _single(pair.g), _single(pair.x)
            scaled = g * by_row.to(g).view(-1, *[1] * (g.ndim - 1))
            for number, row in pair.target.pull_back(pair.geometry.total(x, scaled).reshape(1, -1)):
                found[number] = row[0]
        return found

    def _keep(self, kept: Kept) -> None:
        self._add(0, squares_of_rows(kept.patients))
        self._kept.append(kept)

    def _add(self, first_patient: int, squares: Tensor) -> None:
        self._squares[first_patient : first_patient + len(squares)] += squares

    def _drop(self, patients: Tensor) -> None:
        """Make the patients count as nothing. Zero times NaN is NaN, so a factor of zero would not do."""
        rows = torch.zeros(self._rows, dtype=torch.bool, device=patients.device)
        for s in self._segments:
            own = patients[s.first_patient : s.first_patient + s.patients]
            rows[s.rows] = own.repeat_interleave(s.views)
        self._kept = [
            Kept(number=k.number, patients=_without(k.patients, patients), public=k.public) for k in self._kept
        ]
        self._pairs = [
            Pair(target=p.target, geometry=p.geometry, x=_without(p.x, rows), g=_without(p.g, rows))
            for p in self._pairs
        ]


def clip_factors(squares: Tensor, clip_norms: Tensor) -> Tensor:
    """min(1, C / ||g||), and zero where the norm is not finite.  [Abadi et al. 2016, Alg. 1]

    squares: squared norms, float64; a zero norm gives factor one.
    """
    factors = (clip_norms / squares.sqrt()).clamp(max=1.0)
    return torch.where(squares.isfinite(), factors, 0.0)


def clipped_sum_of(rows: Tensor, clip_norm: float) -> Tensor:
    """(P,): sum of min(1, C / ||g||) g over whole gradients that were given, (n, P); not finite counts as zero."""
    squares = squares_of_rows(rows)
    factors = clip_factors(squares, torch.full_like(squares, clip_norm))
    return factors.to(rows) @ _without(rows, ~squares.isfinite())


def _without(rows: Tensor, dropped: Tensor) -> Tensor:
    mask = dropped.view(-1, *[1] * (rows.ndim - 1))
    return torch.where(mask, torch.zeros((), dtype=rows.dtype, device=rows.device), rows)


def _single(t: Tensor) -> Tensor:
    """At least float32: products of two bfloat16 numbers are exact in it, so norms and sums see the same gradient."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t
