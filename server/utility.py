"""How useful the synthetic scans are: train a segmenter on them, let hospitals test it on held-out patients.

Beside it stand a segmenter trained on public phantoms (what one has without any hospital) and, in a
research simulation only, one that each hospital trains on its own members (what one could have).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import rfc8785
from numpy.typing import NDArray
from pydantic import TypeAdapter

from common.generator.weights import Weights
from common.measure.dice_sums import mean_and_variance, noise_variance
from common.measure.intervals import Interval
from common.measure.segmentation import train_segmenter
from common.protocol.messages import Order, RefusalReply, Reply, SegmenterSource, UtilityOrder, UtilityReply
from common.settings.load import study_digest
from common.settings.study import Study
from common.telemetry.events import Observer, ignore
from server.sites import NoReply, Sites

# Below this many standard deviations of its own noise, a count of patients cannot carry a mean.
_LEAST_COUNT_SD = 4.0

Answers = Mapping[SegmenterSource, Mapping[str, Reply | NoReply]]


@dataclass(frozen=True, kw_only=True)
class UtilityRow:
    """Dice of one segmenter on the held-out patients of `sites`, pooled.

    dice: one interval a foreground label, in ascending label order; mean: over the labels. The intervals hold the
    sites' noise and an upper bound on sampling error. patients: with noise. exact: answered without noise.
    """

    source: SegmenterSource
    dice: tuple[Interval, ...]
    mean: Interval
    patients: float
    exact: bool
    sites: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """A site, or for `site` None all of them, gave nothing usable for this segmenter, and why."""

    source: SegmenterSource
    site: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class UtilityResult:
    """Train on one source, test on real held-out patients.

    labels: names of the foreground labels. epsilon_nonmembers: pure epsilon that the noised answers cost each held-out
    patient; exact answers have none and are marked in their row. training_steps: of each segmenter.
    """

    labels: tuple[str, ...]
    rows: tuple[UtilityRow, ...]
    not_measured: tuple[NotMeasured, ...]
    epsilon_nonmembers: float
    training_steps: int

    def row(self, source: SegmenterSource) -> UtilityRow | None:
        """The row of one source; None when it was not measured."""
        return next((row for row in self.rows if row.source is source), None)

    def to_json(self) -> str:
        """Canonical JSON (RFC 8785)."""
        canonical: bytes = rfc8785.dumps(_ADAPTER.dump_python(self, mode="json"))
        return canonical.decode()

    @classmethod
    def from_json(cls, text: str) -> UtilityResult:
        """Read back what `to_json` wrote. Raises ValueError for anything else."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(UtilityResult)


def measure_utility(
    study: Study,
    sites: Sites,
    *,
    synthetic: NDArray[np.floating],
    phantom: NDArray[np.floating],
    seed: int,
    observer: Observer = ignore,
) -> UtilityResult:
    """Train on synthetic and on phantom pairs, ask every site for the Dice on its held-out patients.

    synthetic, phantom: (N, 1+K, D, H, W). Both segmenters start alike and see equally many pairs in the same order.
    A site that does not answer is reported, never an error.
    """
    count = min(len(synthetic), len(phantom))
    segmenters: dict[SegmenterSource, Weights] = {}
    for source, pairs in ((SegmenterSource.SYNTHETIC, synthetic), (SegmenterSource.PHANTOM, phantom)):
        segmenters[source] = train_segmenter(
            pairs[:count],
            labels=len(study.labels),
            steps=study.utility.training_steps,
            seed=seed,
            observer=observer,
        )
    return summarise(study, {source: _ask(study, sites, source, w, seed) for source, w in segmenters.items()})


def with_real(study: Study, sites: Sites, result: UtilityResult, *, seed: int) -> UtilityResult:
    """`result` and beside it the Dice of segmenters that each hospital trains on its own members.

    The answers are exact: sites give them in a simulation only, and their ledgers say infinite from then on.
    """
    real = summarise(study, {SegmenterSource.REAL: _ask(study, sites, SegmenterSource.REAL, None, seed)})
    return replace(result, rows=(*result.rows, *real.rows), not_measured=(*result.not_measured, *real.not_measured))


def _ask(
    study: Study, sites: Sites, source: SegmenterSource, segmenter: Weights | None, seed: int
) -> Mapping[str, Reply | NoReply]:
    order: Order = UtilityOrder(
        study_digest=study_digest(study),
        source=source,
        segmenter=segmenter,
        training_steps=study.utility.training_steps,
        seed=seed,
    )
    return sites.ask(dict.fromkeys(sites.names, order), study.federation.deadline_s)


def summarise(study: Study, answers: Answers) -> UtilityResult:
    """The pooled table from what the sites answered. Pure.

    Only answers to this study, to the source that was asked for, with the noise that the study states, are used.
    """
    rows: list[UtilityRow] = []
    missing: list[NotMeasured] = []
    digest = study_digest(study)
    for source, replies in answers.items():
        usable: dict[str, UtilityReply] = {}
        for site, reply in replies.items():
            reason = _objection(study, digest, source, reply)
            if reason is None and isinstance(reply, UtilityReply):
                usable[site] = reply
            else:
                missing.append(NotMeasured(source=source, site=site, reason=reason or "no answer"))
        row = _pooled(study, source, usable)
        if row is not None:
            rows.append(row)
        elif usable:
            missing.append(NotMeasured(source=source, site=None, reason="too few held-out patients for the noise"))
    noised = sum(source is not SegmenterSource.REAL for source in answers)
    return UtilityResult(
        labels=tuple(study.labels[value] for value in sorted(study.labels)),
        rows=tuple(rows),
        not_measured=tuple(missing),
        epsilon_nonmembers=noised * study.utility.epsilon_per_answer,
        training_steps=study.utility.training_steps,
    )


def _objection(study: Study, digest: str, source: SegmenterSource, reply: Reply | NoReply) -> str | None:
    """Why this answer cannot be used, as a fixed phrase; None when it can."""
    if isinstance(reply, NoReply):
        return reply.reason.value
    if isinstance(reply, RefusalReply):
        return f"refused: {reply.code.value}"
    if not isinstance(reply, UtilityReply) or reply.study_digest != digest or reply.source is not source:
        return "answered another question"
    exact = source is SegmenterSource.REAL
    objections = {
        "answered for other labels": len(reply.dice_sum) != len(study.labels),
        "answered with other noise than the study states": reply.exact is not exact
        or reply.epsilon != (None if exact else study.utility.epsilon_per_answer),
        "answered with a value that is not a number": not all(map(math.isfinite, (*reply.dice_sum, reply.patients))),
    }
    return next((phrase for phrase, applies in objections.items() if applies), None)


def _pooled(study: Study, source: SegmenterSource, replies: Mapping[str, UtilityReply]) -> UtilityRow | None:
    """One row from usable replies; None when the noised count of patients is too small to divide by."""
    exact = source is SegmenterSource.REAL
    labels = len(study.labels)
    per_site = 0.0 if exact else noise_variance(labels, study.utility.epsilon_per_answer)
    variance = per_site * len(replies)
    patients = math.fsum(reply.patients for reply in replies.values())
    if patients < 1 or patients < _LEAST_COUNT_SD * math.sqrt(variance):
        return None
    sums = [math.fsum(reply.dice_sum[k] for reply in replies.values()) for k in range(labels)]
    means, variances = mean_and_variance(sums, patients, variance_of_noise=variance)
    confidence = study.audit.confidence
    deviations = np.sqrt(variances)
    return UtilityRow(
        source=source,
        dice=tuple(_interval(m, d, confidence) for m, d in zip(means, deviations, strict=True)),
        # Labels of one patient err together, so errors of their mean may add up in full.
        mean=_interval(means.mean(), deviations.mean(), confidence),
        patients=patients,
        exact=exact,
        sites=tuple(replies),
    )


def _interval(mean: float, deviation: float, confidence: float) -> Interval:
    """Normal interval."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = float(z * deviation)
    return Interval(low=float(mean) - half, estimate=float(mean), high=float(mean) + half, confidence=confidence)


def table(result: UtilityResult) -> Sequence[tuple[str, ...]]:
    """Header and rows of plain text, for terminals and benchmarks."""
    header = ("trained on", *result.labels, "mean", "patients")
    body = [
        (row.source.value, *(_text(i) for i in row.dice), _text(row.mean), f"{row.patients:.0f}") for row in result.rows
    ]
    return [header, *body]


def _text(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
