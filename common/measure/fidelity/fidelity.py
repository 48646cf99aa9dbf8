"""All fidelity measures of one synthetic set against one real set, as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.measure.fidelity.comparison import FeatureComparison, compare_features
from common.measure.fidelity.distances import FEWEST, frechet_distance, kernel_distance
from common.measure.fidelity.diversity import difference, mean_similarity
from common.measure.fidelity.encoder import Encoder
from common.measure.fidelity.grey_values import intensity_distances, spectrum_distance_db
from common.measure.fidelity.precision_recall import precision_recall
from common.measure.fidelity.radiomics import FEATURES, radiomics
from common.measure.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class FeatureDistances:
    """How far the features of two sets lie apart, on one feature net; values of two nets cannot be compared.

    f8: recall, f_eighth: precision, of PRD.
    """

    net: str
    net_digest: str
    frechet: float
    kid: Interval
    f8: float
    f_eighth: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How like the real scans the synthetic ones are.

    real, synthetic: scans. features: None where a set has fewer than `distances.FEWEST` scans. similarity_*: mean
    MS-SSIM among pairs of one set; their difference is above zero where synthetic scans repeat one another. intensity:
    1-Wasserstein distance of grey values, at most 2, background first, None where a set lacks the tissue. radiomics:
    over all labels together.
    """

    real: int
    synthetic: int
    features: FeatureDistances | None
    similarity_real: Interval
    similarity_synthetic: Interval
    similarity_difference: Interval
    intensity: tuple[float | None, ...]
    spectrum_db: float
    radiomics: FeatureComparison


def measure_fidelity(
    real: NDArray[np.floating],
    synthetic: NDArray[np.floating],
    *,
    encoder: Callable[[], Encoder],
    spacing_mm: tuple[float, float, float],
    confidence: float = 0.95,
) -> Fidelity:
    """Of pairs (N, 1+K, D, H, W), (M, 1+K, D, H, W), images in [-1, 1]; the order of scans does not matter.

    encoder: gives the feature net, and is not asked where the sets are too small for one.
    It looks at single real scans: in a real study the real side must be public, or the answer paid for.
    Raises ValueError for fewer than `diversity.FEWEST_ALIKE` scans on a side, or other shapes than the encoder's.
    """
    if real.shape[1:] != synthetic.shape[1:]:
        raise ValueError(f"real and synthetic pairs have different shapes: {real.shape[1:]}, {synthetic.shape[1:]}")
    alike_real, alike_synthetic = (mean_similarity(x[:, 0], confidence) for x in (real, synthetic))
    enough = min(len(real), len(synthetic)) >= FEWEST
    return Fidelity(
        real=len(real),
        synthetic=len(synthetic),
        features=_feature_distances(real, synthetic, encoder(), confidence) if enough else None,
        similarity_real=alike_real,
        similarity_synthetic=alike_synthetic,
        similarity_difference=difference(alike_synthetic, alike_real),
        intensity=intensity_distances(real, synthetic),
        spectrum_db=spectrum_distance_db(real[:, 0], synthetic[:, 0], spacing_mm),
        radiomics=compare_features(_radiomics(real, spacing_mm), _radiomics(synthetic, spacing_mm), FEATURES),
    )


def _feature_distances(
    real: NDArray[np.floating], synthetic: NDArray[np.floating], encoder: Encoder, confidence: float
) -> FeatureDistances:
    a, b = encoder(real), encoder(synthetic)
    prd = precision_recall(a, b)
    return FeatureDistances(
        net=encoder.name,
        net_digest=encoder.digest,
        frechet=frechet_distance(a, b),
        kid=kernel_distance(a, b, confidence),
        f8=prd.f8,
        f_eighth=prd.f_eighth,
    )


def _radiomics(pairs: NDArray[np.floating], spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """(N, 8) over the voxels that are more label than background; grey values as shares of the study's range."""
    mask = pairs[:, 1:].sum(axis=1, dtype=np.float32) > 0.5
    return radiomics((pairs[:, 0].astype(np.float32) + 1.0) / 2.0, mask, spacing_mm)
