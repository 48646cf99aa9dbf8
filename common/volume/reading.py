"""A scan, whichever kind of file it lies in: NIfTI, or DICOM where the image is a folder."""

from __future__ import annotations

from pathlib import Path

from common.volume.dicom import is_dicom, pet_in_plane_mm, read_pet, read_structures
from common.volume.nifti import read_nifti, read_nifti_geometry
from common.volume.prepare import to_ras
from common.volume.volume import Volume


def read_image(path: Path) -> Volume:
    """A NIfTI file as it is, or the folder of a DICOM PET series in SUV. Raises as `read_nifti` and `read_pet` do."""
    return read_pet(path) if path.is_dir() else read_nifti(path)


def read_label(path: Path, image: Volume) -> Volume:
    """A NIfTI label map as it is, or an RTSTRUCT on the image's grid. Raises as `read_nifti`, `read_structures` do."""
    return read_structures(path, image) if is_dicom(path) else read_nifti(path)


def in_plane_mm(path: Path) -> tuple[float, float]:
    """Voxel size of an image across the body, right to left and back to front; only headers are read.

    Raises DataError when the header cannot be read.
    """
    if path.is_dir():
        return pet_in_plane_mm(path)
    x, y, _ = to_ras(read_nifti_geometry(path)).spacing_mm
    return x, y
