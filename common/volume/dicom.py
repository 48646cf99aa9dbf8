"""DICOM in: a PET series as SUV, and the structures an RTSTRUCT draws on it. The only file that knows pydicom.

DICOM counts millimetres to the left and to the back (LPS+), `Volume` to the right and to the front (RAS+). Error
texts hold keywords and numbers of voxels; pydicom's own name the patient's values and are not passed on.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, UsageError
from common.volume.contours import Contour, contour_mask
from common.volume.suv import PetFacts, suv_factor
from common.volume.volume import Volume

SUFFIX = ".dcm"
PET, STRUCTURES = "PT", "RTSTRUCT"  # Modality
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MOST_VOXELS = 2**31  # as for NIfTI: a header that claims more is damaged
_SAME_DIRECTION = 1e-4  # of direction cosines
_EVEN = 0.02  # share of the slice distance by which one may differ: positions are rounded to hundredths of a millimetre
_HALF_DAY = timedelta(hours=12)
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_DAMAGED = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class DicomPart:
    """What one header says about the folder or file it stands for.

    modality: PT, RTSTRUCT, MR, ...; "" where it is not readable. series, frame: UIDs of series and frame of reference.
    shown_series, shown_frames: those that an RTSTRUCT is drawn on.
    """

    path: Path
    modality: str
    series: str = ""
    frame: str = ""
    shown_series: tuple[str, ...] = ()
    shown_frames: tuple[str, ...] = ()


class MaskOutside(DataError):
    """What was drawn lies outside the scan."""


class AmbiguousMask(DataError):
    """Several structures, and none is named as the tumour."""


def describe(path: Path) -> DicomPart:
    """Modality and series of a DICOM file, from its header alone. Raises UsageError without the extra `dicom`."""
    try:
        header = _read(path, stop_before_pixels=True)
        with _refusing_damage(), _quiet():
            frames = header.get("ReferencedFrameOfReferenceSequence") or ()
            return DicomPart(
                path=path,
                modality=str(header.get("Modality") or ""),
                series=str(header.get("SeriesInstanceUID") or ""),
                frame=str(header.get("FrameOfReferenceUID") or ""),
                shown_series=tuple(_shown_series(frames)),
                shown_frames=tuple(str(frame.get("FrameOfReferenceUID") or "") for frame in frames),
            )
    except DataError:
        return DicomPart(path=path, modality="")


def read_pet(folder: Path) -> Volume:
    """The PET series in a folder of `.dcm` files, one slice each: (columns, rows, slices) float32 in SUV (g/ml).

    Raises NoSuv, UsageError without the extra `dicom`, or DataError when the files are no single, complete, evenly
    spaced series of transversal, sagittal or any other parallel planes.
    """
    slices = [_read(path) for path in sorted(folder.iterdir()) if is_dicom(path)]
    with _refusing_damage(), _quiet():
        _one_series(slices)
        normal, heights = _heights(slices)
        order = np.argsort(heights)
        slices, heights = [slices[i] for i in order], heights[order]
        step_mm = _even_step(heights)
        first = slices[0]
        i_axis, j_axis = _directions(first)
        between_rows, between_columns = (float(mm) for mm in _need(first, "PixelSpacing"))
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1], affine[:3, 2] = i_axis * between_columns, j_axis * between_rows, normal * step_mm
        affine[:3, 3] = [float(mm) for mm in _need(first, "ImagePositionPatient")]
        begun = [moment for moment in map(_acquired_at, slices) if moment is not None]
        voxels = np.empty((int(first.Columns), int(first.Rows), len(slices)), dtype=np.float32)
        for k, one in enumerate(slices):
            factor = suv_factor(_facts(one, min(begun, default=None)))
            slope, intercept = float(_need(one, "RescaleSlope")), float(one.get("RescaleIntercept") or 0.0)
            voxels[:, :, k] = ((one.pixel_array.astype(np.float64) * slope + intercept) * factor).T
        return Volume(voxels=voxels, affine=_LPS_TO_RAS @ affine)


def pet_in_plane_mm(folder: Path) -> tuple[float, float]:
    """Distance of columns and of rows of a PET series, from one header. Raises DataError when there is none."""
    for path in sorted(folder.iterdir()):
        if is_dicom(path):
            header = _read(path, stop_before_pixels=True)
            with _refusing_damage(), _quiet():
                between_rows, between_columns = (float(mm) for mm in _need(header, "PixelSpacing"))
                return between_columns, between_rows
    raise DataError("the folder holds no DICOM file; no scan was read")


def read_structures(path: Path, image: Volume) -> Volume:
    """The tumours an RTSTRUCT draws, on the image's grid: (I, J, K) uint8, 1 inside.

    Structures whose name begins with GTV (gross tumour volume), all in one label; without such a name, the only one
    there is. Raises AmbiguousMask, MaskOutside when no voxel centre of the image lies inside, UsageError without the
    extra `dicom`, or DataError when the file cannot be read or its contours do not lie in the image's planes.
    """
    header = _read(path)
    with _refusing_damage(), _quiet():
        if header.get("Modality") != STRUCTURES:
            raise DataError("the file is no RTSTRUCT; no label was read")
        to_voxels = (np.linalg.inv(image.affine) @ _LPS_TO_RAS).astype(np.float64)
        structures = [list(_contours(roi, to_voxels)) for roi in _tumours(header)]
    drawn = [contours for contours in structures if contours]
    mask = np.zeros(image.shape, dtype=np.uint8)
    for contours in drawn:
        mask |= contour_mask(contours, image.shape)
    if drawn and not mask.any():
        raise MaskOutside("no voxel of the scan lies inside the contours; no label was read")
    return Volume(voxels=mask, affine=image.affine)


def is_dicom(path: Path) -> bool:
    """Whether a file is named as DICOM; shadow files of macOS are not."""
    return path.suffix.lower() == SUFFIX and not path.name.startswith(".") and path.is_file()


# ---- files


def _read(path: Path, *, stop_before_pixels: bool = False) -> Any:
    try:
        # Here, because it is optional: a hospital with NIfTI files does without.
        from pydicom import dcmread  # noqa: PLC0415
        from pydicom.errors import InvalidDicomError  # noqa: PLC0415
    except ImportError as absent:
        raise UsageError(
            "DICOM files need pydicom; no scan was read. Run `pip install 'consilium[dicom]'`, or convert to NIfTI."
        ) from absent
    try:
        with _quiet():
            return dcmread(path, stop_before_pixels=stop_before_pixels)
    except (InvalidDicomError, *_DAMAGED) as damage:
        raise DataError(f"a file is damaged or not DICOM ({type(damage).__name__}); it was not read") from damage


@contextmanager
def _quiet() -> Iterator[None]:
    """What matters arrives as an error; pydicom also warns and logs about odd values, and shows them."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


@contextmanager
def _refusing_damage() -> Iterator[None]:
    """A value that cannot be used is our error; its text must not show the value."""
    try:
        yield
    except (DataError, UsageError):
        raise
    except _DAMAGED as damage:
        raise DataError(f"a field or the pixels cannot be used ({type(damage).__name__}); it was not read") from damage


def _need(header: Any, keyword: str) -> Any:
    value = header.get(keyword)
    if value is None or value == "":
        raise DataError(f"missing {keyword}; it was not read")
    return value


# ---- PET


def _one_series(slices: Sequence[Any]) -> None:
    """Refuse what is no stack of single-frame PET slices of one series, one size and one direction."""
    if len(slices) < 2:
        raise DataError(f"{len(slices)} DICOM slices are no volume; the scan was not read")
    first = slices[0]
    if any(one.get("Modality") != PET for one in slices):
        raise DataError("a slice is no PET image; the scan was not read")
    if len({str(one.get("SeriesInstanceUID", "")) for one in slices}) > 1:
        raise DataError("slices of several series lie in one folder; the scan was not read")
    if any(int(one.get("NumberOfFrames") or 1) > 1 for one in slices):
        raise DataError("multi-frame (enhanced) PET is not supported; the scan was not read")
    if any(
        (one.Rows, one.Columns, one.PixelSpacing) != (first.Rows, first.Columns, first.PixelSpacing) for one in slices
    ):
        raise DataError("slices differ in size or pixel spacing; the scan was not read")
    if first.Rows * first.Columns * len(slices) > _MOST_VOXELS:
        raise DataError("the headers claim more voxels than a scan has; the scan was not read")
    turn = np.array(_directions(first))
    if any(np.abs(np.array(_directions(one)) - turn).max() > _SAME_DIRECTION for one in slices):
        raise DataError("slices are not parallel; the scan was not read")


def _directions(header: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors, LPS+, along which the column and the row index grow.  [DICOM PS3.3 C.7.6.2.1.1]"""
    cosines = np.array([float(c) for c in _need(header, "ImageOrientationPatient")], dtype=np.float64)
    return cosines[:3], cosines[3:]


def _heights(slices: Sequence[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Normal of the slices, and where each lies along it in millimetres."""
    normal = np.cross(*_directions(slices[0]))
    positions = np.array([[float(mm) for mm in _need(one, "ImagePositionPatient")] for one in slices])
    return normal, positions @ normal


def _even_step(heights: NDArray[np.float64]) -> float:
    """Millimetres between slices; raises DataError where one is missing or there twice."""
    steps = np.diff(heights)
    step_mm = float(np.ptp(heights) / len(steps))
    if step_mm <= 0 or np.abs(steps - step_mm).max() > _EVEN * step_mm:
        raise DataError("slices are missing, doubled or unevenly spaced; the scan was not read")
    return step_mm


def _facts(header: Any, first_acquired_at: datetime | None) -> PetFacts:
    dose: Any = next(iter(header.get("RadiopharmaceuticalInformationSequence") or ()), {})
    corrections = header.get("CorrectedImage") or ()
    return PetFacts(
        units=header.get("Units") or None,
        suv_type=header.get("SUVType") or None,
        decay_correction=header.get("DecayCorrection") or None,
        corrections=(corrections,) if isinstance(corrections, str) else tuple(str(c) for c in corrections),
        weight_kg=_number(header.get("PatientWeight")),
        dose_bq=_number(dose.get("RadionuclideTotalDose")),
        half_life_s=_number(dose.get("RadionuclideHalfLife")),
        injected_at=_injected_at(dose),
        series_at=_moment(header, "Series"),
        acquired_at=_acquired_at(header),
        first_acquired_at=first_acquired_at,
        frame_s=(_number(header.get("ActualFrameDuration")) or 0.0) / 1000.0,
        suv_per_count=_philips(header, 0x00),
        bqml_per_count=_philips(header, 0x09),
    )


def _number(value: Any) -> float | None:
    return None if value is None or value == "" else float(value)


def _philips(header: Any, element: int) -> float | None:
    """A factor of Philips' private block in group 7053."""
    try:
        return _number(header.private_block(0x7053, "Philips PET Private Group")[element].value)
    except KeyError:
        return None


def _moment(header: Any, what: str) -> datetime | None:
    """`SeriesDate` and `SeriesTime`, or those of another prefix. A removed date is the series' own, or none at all."""
    from pydicom.valuerep import DA, TM  # noqa: PLC0415

    clock = TM(header.get(f"{what}Time") or None)
    if clock is None:
        return None
    day = DA(header.get(f"{what}Date") or header.get("SeriesDate") or "19000102")
    return datetime.combine(day, time(clock.hour, clock.minute, clock.second, clock.microsecond))


def _acquired_at(header: Any) -> datetime | None:
    """Start of the slice's acquisition; without a date of its own, after midnight where the series began before."""
    acquired, series = _moment(header, "Acquisition"), _moment(header, "Series")
    undated = not header.get("AcquisitionDate")
    if acquired and series and undated and series - acquired > _HALF_DAY:
        return acquired + timedelta(days=1)
    return acquired


def _injected_at(dose: Any) -> datetime | time | None:
    """With its date where that is stated. Whoever writes an offset to UTC writes it for all, so it is left out."""
    from pydicom.valuerep import DT, TM  # noqa: PLC0415

    stated = DT(dose.get("RadiopharmaceuticalStartDateTime") or None)
    if stated is not None:
        return datetime.combine(stated.date(), stated.time())
    clock = TM(dose.get("RadiopharmaceuticalStartTime") or None)
    return None if clock is None else time(clock.hour, clock.minute, clock.second, clock.microsecond)


# ---- RTSTRUCT


def _shown_series(frames: Sequence[Any]) -> Iterator[str]:
    for frame in frames:
        for study in frame.get("RTReferencedStudySequence") or ():
            for series in study.get("RTReferencedSeriesSequence") or ():
                yield str(series.get("SeriesInstanceUID", ""))


def _tumours(header: Any) -> list[Any]:
    """Contour items of the structures named GTV..., or of the only structure."""
    names = {int(roi.ROINumber): str(roi.get("ROIName") or "") for roi in _need(header, "StructureSetROISequence")}
    items = {int(item.ReferencedROINumber): item for item in _need(header, "ROIContourSequence")}
    named = [number for number, name in names.items() if name.strip().upper().startswith("GTV")]
    if not named and len(names) > 1:
        raise AmbiguousMask(f"{len(names)} structures and none is named GTV...; no label was read")
    return [items[number] for number in named or names if number in items]


def _contours(item: Any, to_voxels: NDArray[np.float64]) -> Iterator[Contour]:
    """Closed contours in voxel indices; raises DataError for open ones and for those across the slices."""
    for contour in item.get("ContourSequence") or ():
        if contour.get("ContourGeometricType") not in _CLOSED:
            raise DataError("a contour is not closed and planar; no label was read")
        points = np.array([float(mm) for mm in contour.ContourData], dtype=np.float64).reshape(-1, 3)
        indices = points @ to_voxels[:3, :3].T + to_voxels[:3, 3]
        if not np.isfinite(indices).all() or not len(indices):
            raise DataError("a contour has no usable points; no label was read")
        if np.ptp(indices[:, 2]) > 0.5:
            raise DataError("contours do not lie in the planes of the image; no label was read")
        yield Contour(points=indices[:, :2], height=float(indices[:, 2].mean()))
