"""Tiny PET series and structure sets, written as a scanner would. A test states what it changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, PositronEmissionTomographyImageStorage, RTStructureSetStorage

SERIES, FRAME = "1.2.3.4", "1.2.3.5"
DOSE: dict[str, Any] = {
    "RadionuclideTotalDose": "3.7e8",
    "RadionuclideHalfLife": "6586.2",
    "RadiopharmaceuticalStartTime": "100000",
}
HEADER: dict[str, Any] = {
    "Modality": "PT",
    "SeriesInstanceUID": SERIES,
    "FrameOfReferenceUID": FRAME,
    "SeriesDate": "20200102",
    "SeriesTime": "110000",
    "AcquisitionDate": "20200102",
    "AcquisitionTime": "110000",
    "PatientWeight": "70",
    "Units": "BQML",
    "DecayCorrection": "START",
    "CorrectedImage": ["DECY", "ATTN"],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PixelSpacing": [4.0, 3.0],  # between rows, between columns
    "RescaleIntercept": 0,
}


def write_pet(
    folder: Path,
    counts: NDArray[np.int16],
    *,
    slopes: Sequence[float] = (),
    dose: dict[str, Any] | None = None,
    **header: Any,
) -> Path:
    """A series of (slices, rows, columns) stored values, 5 mm apart from the origin. None removes a field."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, plane in enumerate(counts):
        one = _file(PositronEmissionTomographyImageStorage)
        fields = {
            **HEADER,
            "ImagePositionPatient": [0, 0, 5.0 * k],
            "RescaleSlope": slopes[k] if slopes else 1,
            **header,
        }
        for keyword, value in fields.items():
            if value is not None:
                setattr(one, keyword, value)
        given = Dataset()
        for keyword, value in {**DOSE, **(dose or {})}.items():
            if value is not None:
                setattr(given, keyword, value)
        one.RadiopharmaceuticalInformationSequence = [given]
        one.Rows, one.Columns = plane.shape
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.PixelData = plane.astype("<i2").tobytes()
        one.save_as(folder / f"{len(counts) - k:03d}.dcm", enforce_file_format=True)  # names run against the slices
    return folder


def write_structures(path: Path, structures: dict[str, list[list[tuple[float, float, float]]]], **shown: str) -> Path:
    """Name of a structure -> contours -> points in millimetres, LPS+. shown: other `series` or `frame`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    one = _file(RTStructureSetStorage)
    one.Modality = "RTSTRUCT"
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = shown.get("series", SERIES)
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = shown.get("frame", FRAME)
    frame.RTReferencedStudySequence = [study]
    one.ReferencedFrameOfReferenceSequence = [frame]
    one.StructureSetROISequence, one.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items(), start=1):
        roi, item = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        item.ReferencedROINumber, item.ContourSequence = number, []
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(points)
            contour.ContourData = [mm for point in points for mm in point]
            item.ContourSequence.append(contour)
        one.StructureSetROISequence.append(roi)
        one.ROIContourSequence.append(item)
    one.save_as(path, enforce_file_format=True)
    return path


def box(low: tuple[float, float], high: tuple[float, float], z: float) -> list[tuple[float, float, float]]:
    """A rectangle in the plane z, millimetres."""
    return [(low[0], low[1], z), (high[0], low[1], z), (high[0], high[1], z), (low[0], high[1], z)]


def _file(kind: str) -> Dataset:
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = kind
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = "1.2.3.6"
    return one
