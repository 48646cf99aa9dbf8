"""The clipped sum of per-patient gradients in one forward and one backward: book-keeping clipping.

A patient's gradient is never made where its norm can be had for less: each layer's backward gives the input gradient
only and writes down its input and output gradient, from which the norms follow; the clipped sum is then one ordinary
weight gradient with scaled rows.  [Goodfellow 2015; Bu et al. 2023, "book-keeping"]

Under autocast, forward and input gradients run in the shorter type. Norms and sums are float32 (norms are added up in
float64) and both read the very same stored inputs and output gradients, so what is bounded is what is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from client.training.clipping.book import Book, Segment, clipped_sum_of
from client.training.clipping.geometry import Task
from client.training.clipping.layers import Recorder
from client.training.clipping.part import Given, Part, Run, passes
from client.training.clipping.requirements import require_rows_apart, require_separable
from client.training.clipping.routes import Route, route_by_rule
from client.training.clipping.watch import Watch

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class PatientClipper:
    """Clipped sums for one critic, which is only read: no hook, no `.grad`, no replaced module.

    patients_at_once: patients of one pass, None for all; bounds memory and changes the result by rounding only.
    autocast: shorter type of forward and input gradients (torch.bfloat16), None for the critic's own.
    channels_last: run 4-D and 5-D rows in that memory layout.
    route: how norms are made; must be a pure function of its task, or a campaign cannot be repeated bit for bit.

    Raises SettingsError for a critic in which patients cannot be told apart.
    """

    def __init__(
        self,
        critic: nn.Module,
        *,
        patients_at_once: int | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        route: Callable[[Task], Route] = route_by_rule,
    ) -> None:
        require_separable(critic)
        if patients_at_once is not None and patients_at_once < 1:
            raise ValueError(f"patients_at_once must be at least 1, got {patients_at_once}")
        self._critic = critic
        self._patients_at_once = patients_at_once
        self._autocast = autocast
        self._channels_last = channels_last
        self._route = route
        self._probed: set[torch.Size] = set()

    def clipped_sum(self, parts: Sequence[Part], given: Given | None = None) -> Tensor:
        """(P,): sum over parts of weight * sum over patients of min(1, C / ||g||) g.  [Abadi et al. 2016, Alg. 1]

        g is the gradient of the mean loss over one patient's views. The result is flat, in the order of
        `critic.parameters()`. A patient whose gradient is not finite counts as exactly zero, silently: an error
        or a NaN would tell that they were drawn. No patients at all give zeros.

        given: gradients from elsewhere, clipped by the same factors. Their sum comes last, as one vector, so that it
        rounds the patients' sum no more than one more patient would.
        """
        parameters = dict(self._critic.named_parameters())
        first = next(iter(parameters.values()))
        total: Tensor | None = None
        for runs in passes(parts, self._patients_at_once):
            with _exact_kernels():
                found = self._pass(parameters, runs)
            flat = torch.cat(
                [
                    found[number].flatten() if number in found else p.new_zeros(p.numel())
                    for number, p in enumerate(parameters.values())
                ]
            )
            total = flat if total is None else total.add_(flat)
        if total is None:
            total = first.new_zeros(sum(p.numel() for p in parameters.values()))
        return total if given is None else total.add_(clipped_sum_of(given.gradients, given.clip_norm))

    def _pass(self, parameters: dict[str, nn.Parameter], runs: Sequence[Run]) -> dict[int, Tensor]:
        rows = self._rows(runs)
        if rows.shape[1:] not in self._probed:
            require_rows_apart(self._critic, rows)
            self._probed.add(rows.shape[1:])
        segments = _segments(runs)
        device = next(iter(parameters.values())).device
        book = Book(segments, len(rows), self._route, device)
        scores, anchor = self._scores(parameters, book, rows)
        slopes = _slopes(runs, scores)
        torch.autograd.grad(scores, anchor, slopes, allow_unused=True)
        clipped = [run for run in runs if run.part.clip_norm is not None]
        return book.sums(
            _by_patient(clipped, [run.part.clip_norm or 0.0 for run in clipped], device),
            _by_patient(clipped, [run.part.weight for run in clipped], device),
        )

    def _rows(self, runs: Sequence[Run]) -> Tensor:
        """(rows, C, ...): the runs' rows one after the other, in one copy."""
        first = runs[0].rows
        layout = LAST.get(first.ndim, torch.contiguous_format) if self._channels_last else torch.contiguous_format
        if len(runs) == 1:
            return first.contiguous(memory_format=layout)
        shape = (sum(len(run.rows) for run in runs), *first.shape[1:])
        rows = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
        row = 0
        for run in runs:
            rows[row : row + len(run.rows)] = run.rows
            row += len(run.rows)
        return rows

    def _scores(self, parameters: dict[str, nn.Parameter], book: Book, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(rows,) scores, and what they hang on."""
        with torch.enable_grad():
            anchor = torch.zeros((), device=rows.device, requires_grad=True)
            watch = Watch(parameters, book, anchor)
            with (
                torch.autocast(rows.device.type, dtype=self._autocast, enabled=self._autocast is not None),
                Recorder(watch),
            ):
                scores = self._critic(rows)
            watch.refuse_leftovers(scores)
            return scores.reshape(-1), anchor


def _exact_kernels() -> AbstractContextManager[None]:
    """On a GPU: the same kernels for the same input, and float32 products in full, as the norms are."""
    exact: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return exact


def _segments(runs: Sequence[Run]) -> list[Segment]:
    """The clipped runs; neighbours with equally many views are one segment, whatever their bounds."""
    segments: list[Segment] = []
    row = patient = 0
    for run in runs:
        if run.part.clip_norm is None:
            break
        last = segments[-1] if segments else None
        if last is not None and last.views == run.views:
            segments[-1] = Segment(
                first_row=last.first_row,
                first_patient=last.first_patient,
                patients=last.patients + run.patients,
                views=run.views,
            )
        else:
            segments.append(Segment(first_row=row, first_patient=patient, patients=run.patients, views=run.views))
        row += len(run.rows)
        patient += run.patients
    return segments


def _slopes(runs: Sequence[Run], scores: Tensor) -> Tensor:
    """(rows,): derivative of the summed losses by each score; public parts carry their weight here."""
    single = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    slopes, first = [], 0
    for run in runs:
        own = run.loss_slopes(single[first : first + len(run.rows)])
        slopes.append(own if run.part.clip_norm is not None else own * run.part.weight)
        first += len(run.rows)
    return torch.cat(slopes).to(scores.dtype)


def _by_patient(runs: Sequence[Run], values: Sequence[float], device: torch.device) -> Tensor:
    """(patients,) float64: each run's value for each of its patients."""
    counts = torch.tensor([run.patients for run in runs], dtype=torch.int64)
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(counts).to(device)
