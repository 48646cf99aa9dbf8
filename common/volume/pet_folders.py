"""Folders with one sub-folder a patient, as PET collections come: NIfTI by file name, or DICOM by header.

NIfTI    PATIENT/PET_image.nii.gz + PATIENT/PET_mask.nii.gz; the values are SUV already. Other files are ignored.
DICOM    PATIENT/**/*.dcm; a folder of PT files is a scan, an RTSTRUCT file names the series that it is drawn on, or
         at least its frame of reference. Other modalities, and structures drawn on them, are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.volume.dicom import PET, STRUCTURES, DicomPart, describe, is_dicom
from common.volume.nifti import SUFFIXES

MODALITY = "pet"
_IMAGE, _MASK = "PET_image", "PET_mask"


@dataclass(frozen=True, kw_only=True)
class PetCase:
    """What belongs to one scan: images and masks, of which there should be one each; and what cannot be read.

    An image is a file, or the folder of a DICOM series.
    """

    patient: str
    scan: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    unreadable: tuple[Path, ...] = ()


def has_pet_files(folder: Path) -> bool:
    """Whether some sub-folder holds PET as NIfTI; a label map without its image counts too."""
    return any(_named(patient, _IMAGE) or _named(patient, _MASK) for patient in _patients(folder))


def has_dicom(folder: Path) -> bool:
    """Whether some sub-folder holds DICOM files, at any depth."""
    return any(is_dicom(path) for patient in _patients(folder) for path in patient.rglob("*"))


def pet_files(folder: Path) -> Iterator[PetCase]:
    """NIfTI cases by name; a sub-folder without PET is passed over."""
    for patient in _patients(folder):
        images, masks = _named(patient, _IMAGE), _named(patient, _MASK)
        if images or masks:
            yield PetCase(patient=patient.name, scan=_IMAGE, images=images, masks=masks)


def dicom_cases(folder: Path) -> Iterator[PetCase]:
    """DICOM cases; the header of every file is read.

    Raises UsageError when the extra `dicom` is not installed.
    """
    for patient in _patients(folder):
        parts = [part for place in _places(patient) for part in _parts(place)]
        series = [part for part in parts if part.modality == PET]
        structures = [part for part in parts if part.modality == STRUCTURES]
        places = {one.path for one in series}  # a file in one of these is named when the series is read
        unreadable = tuple(part.path for part in parts if not part.modality and part.path.parent not in places)
        if unreadable or (parts and not series):
            masks = tuple(part.path for part in structures) if not series else ()
            yield PetCase(patient=patient.name, scan="", images=(), masks=masks, unreadable=unreadable)
        for one in series:
            scan = one.path.relative_to(patient).as_posix() if one.path != patient else patient.name
            yield PetCase(patient=patient.name, scan=scan, images=(one.path,), masks=_drawn_on(one, structures))


def _drawn_on(series: DicomPart, structures: list[DicomPart]) -> tuple[Path, ...]:
    """Structure sets of this series; without any, those of another in the same frame, as of the CT of a PET/CT."""
    own = tuple(part.path for part in structures if series.series in part.shown_series)
    return own or tuple(part.path for part in structures if series.frame and series.frame in part.shown_frames)


def _parts(place: Path) -> Iterator[DicomPart]:
    """The images of a folder as one part for each modality, named by the folder, and each structure set in it."""
    seen: set[str] = set()
    for path in sorted(path for path in place.iterdir() if is_dicom(path)):
        part = describe(path)
        if part.modality in ("", STRUCTURES):
            yield part
        elif part.modality not in seen:
            seen.add(part.modality)
            yield replace(part, path=place)


def _places(patient: Path) -> list[Path]:
    """Folders of a patient that hold DICOM files directly."""
    return sorted({path.parent for path in patient.rglob("*") if is_dicom(path)})


def _patients(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _named(patient: Path, stem: str) -> tuple[Path, ...]:
    return tuple(path for path in (patient / f"{stem}{suffix}" for suffix in SUFFIXES) if path.is_file())
