"""What is clipped: parts of a step's loss, each a number of patients with one or more views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import DataError

PatientLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Patients that share a loss and a bound: the drawn patients, or the generated volumes as if they were patients.

    views: (B, V, C, ...), V views of each of B patients; or (R, C, ...) with `views_per_patient`, rows ordered by
        patient. B may be 0: a Poisson draw may be empty.
    loss: scores (V,) of one patient -> that patient's scalar loss, the mean over their views.
    clip_norm: L2 bound C of one patient's gradient; None leaves it as it is, for rows that hold no private data.
    weight: public factor of this part in the sum.

    Raises DataError for a patient without a view, ValueError for a bound or weight that bounds nothing.
    """

    views: Tensor
    loss: PatientLoss
    clip_norm: float | None
    weight: float = 1.0
    views_per_patient: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ValueError(f"clip_norm must be positive and finite, got {self.clip_norm}; nothing was trained")
        if not math.isfinite(self.weight):
            raise ValueError(f"a part's weight must be finite, got {self.weight}; nothing was trained")
        if self.views_per_patient is None:
            if self.views.ndim < 3 or self.views.shape[1] == 0:
                raise DataError(_without_view(self.views))
            return
        if any(count < 1 for count in self.views_per_patient):
            raise DataError(_without_view(self.views))
        if sum(self.views_per_patient) != len(self.views):
            raise DataError(
                f"views_per_patient counts {sum(self.views_per_patient)} views, {len(self.views)} were given; "
                "nothing was trained. Give the rows ordered by patient, with one count a patient."
            )

    def counts(self) -> list[int]:
        """Views of each patient."""
        if self.views_per_patient is not None:
            return list(self.views_per_patient)
        return [self.views.shape[1]] * len(self.views)


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """Whole gradients that no pass of the critic makes, one unit a row: clipped and summed like a patient's.

    gradients: (n, P), in the order of `critic.parameters()`; n may be 0. clip_norm: L2 bound C of one row.
    """

    gradients: Tensor
    clip_norm: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Patients of one part with equally many views. rows: (patients * views, C, ...), patient by patient."""

    part: Part
    rows: Tensor
    views: int

    @property
    def patients(self) -> int:
        """How many patients."""
        return len(self.rows) // self.views

    def cut(self, first: int, patients: int) -> Run:
        """Some of the patients."""
        rows = self.rows[first * self.views : (first + patients) * self.views]
        return Run(part=self.part, rows=rows, views=self.views)

    def loss_slopes(self, scores: Tensor) -> Tensor:
        """Derivative of the summed patients' losses by each score. scores: (rows,) -> (rows,)."""
        leaf = scores.detach().requires_grad_()
        losses = torch.func.vmap(self.part.loss)(leaf.view(self.patients, self.views))
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
        return slopes


def runs_of(part: Part) -> list[Run]:
    """The part's patients, grouped by their number of views."""
    views = part.views.detach()
    if part.views_per_patient is None:
        return [Run(part=part, rows=views.flatten(0, 1), views=views.shape[1])] if len(views) else []
    counts = torch.tensor(part.views_per_patient, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (R,) patient of each row
    return [
        Run(part=part, rows=views[(counts[owner] == count).to(views.device)], views=int(count))
        for count in torch.unique(counts)
    ]


def passes(parts: Sequence[Part], patients_at_once: int | None) -> Iterator[list[Run]]:
    """The runs of one forward and backward each: clipped before public, equal numbers of views side by side."""
    runs = [run for part in parts for run in runs_of(part)]
    runs.sort(key=lambda run: (run.part.clip_norm is None, run.views))
    room = patients_at_once
    now: list[Run] = []
    for run in runs:
        first = 0
        while first < run.patients:
            taken = run.patients - first if room is None else min(room, run.patients - first)
            now.append(run.cut(first, taken))
            first += taken
            if room is not None:
                room -= taken
                if room == 0:
                    yield now
                    now, room = [], patients_at_once
    if now:
        yield now


def _without_view(views: Tensor) -> str:
    return (
        f"a patient without any view in rows of shape {tuple(views.shape)}; nothing was trained. "
        "Every patient needs at least one view: (B, V, C, D, H, W) with V >= 1."
    )
