"""How like a site's members the volumes of a generator are: every measure of an exact course answer, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.measure.fidelity.diversity import FEWEST_ALIKE
from common.measure.fidelity.encoder import Encoder, study_encoder
from common.measure.fidelity.fidelity import Fidelity, measure_fidelity
from common.protocol.messages import RELEASE_GRID, FidelityAnswer, FidelityMeasure
from common.settings.study import Study

_LARGEST: Final = 1e6  # a distance beyond it is as bad as this


def fidelity_of(
    study: Study,
    real: Sequence[NDArray[np.floating]],
    draw: Callable[[int], NDArray[np.floating]],
    *,
    most: int,
    encoder: Callable[[Study], Encoder] = study_encoder,
) -> tuple[FidelityAnswer, ...]:
    """real: pairs (1+K, D, H, W), one of each member. Every measure in its order.

    draw: that many synthetic pairs (N, 1+K, D, H, W), `most` at most.

    Equally many of both, because most distances of finite sets depend on their size. None where these are too few: a
    feature net's distances need more scans than the others.
    """
    count = min(len(real), most)
    values: dict[FidelityMeasure, float | None] = {}
    if count >= FEWEST_ALIKE:
        values = _flat(
            measure_fidelity(
                np.stack(real[:count]).astype(np.float32),
                draw(count),
                encoder=lambda: encoder(study),
                spacing_mm=study.grid.spacing_mm,
            )
        )
    return tuple(FidelityAnswer(measure=measure, value=_on_grid(values.get(measure))) for measure in FidelityMeasure)


def _flat(fidelity: Fidelity) -> dict[FidelityMeasure, float | None]:
    features, radiomics = fidelity.features, fidelity.radiomics
    distances = [test.distance for test in radiomics.tests if test.distance is not None]
    return {
        FidelityMeasure.FRECHET: features.frechet if features else None,
        FidelityMeasure.KERNEL: features.kid.estimate if features else None,
        FidelityMeasure.RECALL: features.f8 if features else None,
        FidelityMeasure.PRECISION: features.f_eighth if features else None,
        FidelityMeasure.SIMILARITY_REAL: fidelity.similarity_real.estimate,
        FidelityMeasure.SIMILARITY_SYNTHETIC: fidelity.similarity_synthetic.estimate,
        FidelityMeasure.INTENSITY: max((d for d in fidelity.intensity if d is not None), default=None),
        FidelityMeasure.SPECTRUM_DB: fidelity.spectrum_db,
        FidelityMeasure.RADIOMICS: max(distances, default=None),
        FidelityMeasure.RADIOMICS_DIFFERING: float(len(radiomics.differ())) if distances else None,
        FidelityMeasure.RADIOMICS_CORRELATION: radiomics.correlation_difference,
    }


def _on_grid(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return round(min(max(value, -_LARGEST), _LARGEST) / RELEASE_GRID) * RELEASE_GRID
