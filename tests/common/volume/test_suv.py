"""SUV against numbers worked out by hand, and every way in which a header can fail to give one."""

from dataclasses import replace
from datetime import datetime, time

import pytest

from common.volume.suv import NoSuv, PetFacts, body_weight_suv, seconds_since_injection, suv_factor

SERIES = datetime(2020, 1, 2, 11)
# One half-life between injection and the series: half of 200 MBq is left of a patient of 50 kg.
FACTS = PetFacts(
    units="BQML",
    decay_correction="START",
    corrections=("DECY", "ATTN"),
    weight_kg=50.0,
    dose_bq=2e8,
    half_life_s=3600.0,
    injected_at=time(10),
    series_at=SERIES,
    acquired_at=SERIES,
    first_acquired_at=SERIES,
)


def test_a_dose_spread_evenly_over_the_body_has_suv_one() -> None:
    assert body_weight_suv(1e8 / 50_000, weight_kg=50, dose_bq=2e8, half_life_s=3600, decay_s=3600) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 50_000 / 1e8),
        ({"decay_correction": "ADMIN"}, 50_000 / 2e8),
        ({"decay_correction": "ADMIN", "injected_at": None}, 50_000 / 2e8),
        ({"decay_correction": "NONE", "corrections": ("ATTN",), "acquired_at": SERIES.replace(hour=12)}, 50_000 / 5e7),
        (
            # The middle of the frame is two hours after injection.
            {"decay_correction": "NONE", "acquired_at": SERIES.replace(minute=55), "frame_s": 600.0},
            50_000 / 5e7,
        ),
        ({"acquired_at": SERIES.replace(hour=12)}, 50_000 / 1e8),  # a later bed position is corrected to the first
        ({"series_at": None}, 50_000 / 1e8),
        ({"series_at": SERIES.replace(hour=15)}, 50_000 / 1e8),  # a program that reformatted wrote its own time
        ({"first_acquired_at": None}, 50_000 / 1e8),
        ({"injected_at": datetime(2020, 1, 2, 9)}, 50_000 / 5e7),
        ({"units": "GML"}, 1.0),
        ({"units": "GML", "suv_type": "BW", "weight_kg": None, "dose_bq": None}, 1.0),
        ({"units": "CNTS", "suv_per_count": 0.25, "weight_kg": None}, 0.25),
        ({"units": "CNTS", "bqml_per_count": 3.0}, 3 * 50_000 / 1e8),
    ],
)
def test_factor_by_unit_and_decay_correction(changes: dict[str, object], expected: float) -> None:
    assert suv_factor(replace(FACTS, **changes)) == pytest.approx(expected, rel=1e-12)


def test_a_time_of_day_after_the_scans_was_before_midnight() -> None:
    early = datetime(2020, 1, 2, 0, 20)
    assert seconds_since_injection(time(23, 50), early) == 1800
    assert seconds_since_injection(datetime(2020, 1, 1, 23, 50), early) == 1800


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weight_kg": None}, "missing PatientWeight"),
        ({"dose_bq": None}, "missing RadionuclideTotalDose"),
        ({"half_life_s": None}, "missing RadionuclideHalfLife"),
        ({"injected_at": None}, "missing RadiopharmaceuticalStartTime"),
        ({"decay_correction": None}, "missing DecayCorrection"),
        ({"weight_kg": None, "dose_bq": None}, "missing PatientWeight, RadionuclideTotalDose"),
        ({"series_at": None, "first_acquired_at": None}, "missing SeriesTime, AcquisitionTime"),
        ({"decay_correction": "NONE", "acquired_at": None}, "missing AcquisitionTime"),
        ({"weight_kg": 0.0}, "PatientWeight is not a positive number"),
        ({"half_life_s": float("nan")}, "RadionuclideHalfLife is not a positive number"),
        ({"dose_bq": 200.0}, "RadionuclideTotalDose is too small to be in becquerels"),
        ({"decay_correction": "LATER"}, "DecayCorrection is none of START, ADMIN, NONE"),
        ({"corrections": ("DECY",)}, "CorrectedImage lacks ATTN: attenuation is not corrected"),
        ({"corrections": ("ATTN",)}, "DecayCorrection and CorrectedImage contradict each other"),
        ({"injected_at": time(23)}, "RadiopharmaceuticalStartTime lies more than ten half-lives before the scan"),
        ({"injected_at": datetime(2020, 1, 3)}, "RadiopharmaceuticalStartDateTime lies after the scan"),
        ({"units": None}, "missing Units"),
        ({"units": "PROPCNTS"}, "Units is none of BQML, CNTS, GML"),
        ({"units": "CNTS"}, "Units is CNTS and neither (7053,1000) nor (7053,1009) is stated"),
        ({"units": "GML", "suv_type": "LBM"}, "SUVType is not BW (body weight)"),
    ],
)
def test_what_is_missing_is_named_by_its_keyword_and_no_value_is_shown(changes: dict[str, object], what: str) -> None:
    with pytest.raises(NoSuv) as refusal:
        suv_factor(replace(FACTS, **changes))
    assert refusal.value.what == what
    assert str(refusal.value) == f"SUV cannot be computed: {what}; the scan was not read"
