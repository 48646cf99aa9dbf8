"""Standardised uptake value of a PET scan, from what its DICOM header says.

Fields are named by their DICOM keyword, in the errors too; no value of a patient is ever in a text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, time, timedelta

from common.errors import DataError

_DAY_S = 86400.0
_MOST_HALF_LIVES = 10.0  # after that a thousandth of the dose is left: the times contradict each other
_LEAST_DOSE_BQ = 1e5  # a smaller number is megabecquerels, which some exports write into the field for becquerels


class NoSuv(DataError):
    """The header does not say what the SUV is computed from. what: is missing or wrong, by DICOM keyword."""

    def __init__(self, what: str) -> None:
        super().__init__(f"SUV cannot be computed: {what}; the scan was not read")
        self.what = what


@dataclass(frozen=True, kw_only=True)
class PetFacts:
    """What the header of one PET slice says about dose, weight and time; None where it says nothing.

    units: BQML, CNTS or GML. suv_type: of GML. decay_correction: START, ADMIN or NONE. corrections: CorrectedImage.
    injected_at: a bare time of day where no date is stated. series_at: decay reference of the series.
    acquired_at: start of this slice's acquisition; first_acquired_at: of the earliest slice. frame_s: its duration.
    suv_per_count, bqml_per_count: Philips (7053,1000) and (7053,1009), the only meaning that counts have.
    """

    units: str | None
    suv_type: str | None = None
    decay_correction: str | None = None
    corrections: tuple[str, ...] = ()
    weight_kg: float | None = None
    dose_bq: float | None = None
    half_life_s: float | None = None
    injected_at: datetime | time | None = None
    series_at: datetime | None = None
    acquired_at: datetime | None = None
    first_acquired_at: datetime | None = None
    frame_s: float = 0.0
    suv_per_count: float | None = None
    bqml_per_count: float | None = None


def body_weight_suv(
    activity_bqml: float, *, weight_kg: float, dose_bq: float, half_life_s: float, decay_s: float
) -> float:
    """SUV = C w / (D 2^(-t / T)), in g/ml.  [Kinahan & Fletcher 2010; QIBA vendor-neutral pseudo-code]

    activity_bqml: C, becquerels in a millilitre at the moment that decay correction refers to. decay_s: t, from
    injection to that moment, 0 where C is corrected to injection.
    """
    return activity_bqml * weight_kg * 1000.0 / (dose_bq * math.pow(2.0, -decay_s / half_life_s))


def suv_factor(facts: PetFacts) -> float:
    """SUV (g/ml, body weight) for one unit of the rescaled voxel value.

    Raises NoSuv naming every DICOM keyword that is missing or cannot be used.
    """
    match facts.units:
        case "GML":
            if facts.suv_type not in (None, "BW"):
                raise NoSuv("SUVType is not BW (body weight)")
            return 1.0
        case "CNTS":
            if facts.suv_per_count is not None:
                return _positive(facts.suv_per_count, "the private SUV factor (7053,1000)")
            if facts.bqml_per_count is None:
                raise NoSuv("Units is CNTS and neither (7053,1000) nor (7053,1009) is stated")
            scale = _positive(facts.bqml_per_count, "the private activity factor (7053,1009)")
            return scale * suv_factor(replace(facts, units="BQML"))
        case "BQML":
            return _from_activity(facts)
        case None:
            raise NoSuv("missing Units")
        case _:
            raise NoSuv("Units is none of BQML, CNTS, GML")


def _from_activity(facts: PetFacts) -> float:
    """SUV for one becquerel in a millilitre."""
    corrections = set(facts.corrections)
    if corrections and "ATTN" not in corrections:
        raise NoSuv("CorrectedImage lacks ATTN: attenuation is not corrected")
    needed: dict[str, object] = {
        "PatientWeight": facts.weight_kg,
        "RadionuclideTotalDose": facts.dose_bq,
        "RadionuclideHalfLife": facts.half_life_s,
        "DecayCorrection": facts.decay_correction,
    }
    if facts.decay_correction != "ADMIN":
        needed["RadiopharmaceuticalStartTime"] = facts.injected_at
    missing = [keyword for keyword, value in needed.items() if value is None]
    if missing:
        raise NoSuv("missing " + ", ".join(missing))
    if corrections and facts.decay_correction != "NONE" and "DECY" not in corrections:
        raise NoSuv("DecayCorrection and CorrectedImage contradict each other")
    dose_bq = _positive(facts.dose_bq, "RadionuclideTotalDose")
    if dose_bq < _LEAST_DOSE_BQ:
        raise NoSuv("RadionuclideTotalDose is too small to be in becquerels")
    half_life_s = _positive(facts.half_life_s, "RadionuclideHalfLife")
    return body_weight_suv(
        1.0,
        weight_kg=_positive(facts.weight_kg, "PatientWeight"),
        dose_bq=dose_bq,
        half_life_s=half_life_s,
        decay_s=_decay_s(facts, half_life_s),
    )


def _decay_s(facts: PetFacts, half_life_s: float) -> float:
    """Seconds of decay between the injected dose and the activity as it is stored."""
    match facts.decay_correction:
        case "ADMIN":
            return 0.0
        case "START":
            reference = _series_start(facts)
        case "NONE":
            if facts.acquired_at is None:
                raise NoSuv("missing AcquisitionTime")
            # The mean over a frame is the activity at its middle, up to (decay in the frame)^2 / 24.
            reference = facts.acquired_at + timedelta(seconds=facts.frame_s / 2)
        case _:
            raise NoSuv("DecayCorrection is none of START, ADMIN, NONE")
    elapsed_s = seconds_since_injection(facts.injected_at, reference)
    if elapsed_s > _MOST_HALF_LIVES * half_life_s:
        raise NoSuv("RadiopharmaceuticalStartTime lies more than ten half-lives before the scan")
    return elapsed_s


def _series_start(facts: PetFacts) -> datetime:
    """The moment that START refers to: SeriesTime, unless a later program wrote its own time there."""
    first = facts.first_acquired_at
    if facts.series_at is None:
        if first is None:
            raise NoSuv("missing SeriesTime, AcquisitionTime")
        return first
    return facts.series_at if first is None or facts.series_at <= first else first


def seconds_since_injection(injected_at: datetime | time | None, reference: datetime) -> float:
    """Seconds from injection to the reference; a bare time of day later than the reference's was the day before.

    Raises NoSuv when nothing is stated, or a stated date lies after the reference.
    """
    match injected_at:
        case None:
            raise NoSuv("missing RadiopharmaceuticalStartTime")
        case datetime():
            elapsed_s = (reference - injected_at).total_seconds()
            if elapsed_s < 0:
                raise NoSuv("RadiopharmaceuticalStartDateTime lies after the scan")
            return elapsed_s
        case _:
            return (reference - datetime.combine(reference.date(), injected_at)).total_seconds() % _DAY_S


def _positive(value: float | None, name: str) -> float:
    if value is None or not (math.isfinite(value) and value > 0):
        raise NoSuv(f"{name} is not a positive number")
    return value
