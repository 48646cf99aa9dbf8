"""A tiny study with a warm-up of every kind of feature, and its map: drawn once, used by the tests of both sides."""

from __future__ import annotations

from typing import Any

from common.measure.features import FeatureMap, feature_map
from common.settings.study import Study
from tests.tiny_studies import tiny_study

WARM_UP = {"share": 0.25, "components": 3, "surroundings": 1, "histogram_bins": 4, "volume_bins": 3, "steps": 3}
FEATURES = 2 * 3 + 27 + 2 * 4 + 3


def warmed_study(**changes: Any) -> Study:
    """The tiny study with a warm-up; the map depends on nothing that tests change."""
    return tiny_study(**{"warm_up": WARM_UP, **changes})


def warmed_map() -> FeatureMap:
    return feature_map(warmed_study())
