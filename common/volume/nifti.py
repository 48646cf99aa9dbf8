"""NIfTI files in and out; the only file that knows nibabel."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import nibabel.imageglobals
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from common.errors import DataError
from common.volume.volume import Volume

SUFFIXES = (".nii.gz", ".nii")
_MOST_VOXELS = 2**31  # a header that claims more is damaged, and would exhaust memory before the data ends
_CHUNK = 2**20  # bytes
_NIFTI2 = ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))  # size of the header, its first field
_DAMAGED = (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, zlib.error, ValueError, OverflowError)


class NotThreeDimensional(DataError):
    """The file holds a series, a plane or vectors instead of one 3-D volume."""


class NoOrientation(DataError):
    """The file does not say where its voxels lie; guessing could mirror left and right."""


def read_nifti(path: Path) -> Volume:
    """The volume in a `.nii` or `.nii.gz` file; trailing axes of length one are dropped.

    Voxels keep their integer type; real values, and integers with a scale, become float32.
    Raises NotThreeDimensional, NoOrientation, or DataError when the file cannot be read to its end.
    """
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream, _silent_nibabel():
            volume = _read(stream)
            # gzip compares its checksum only at the end; nibabel stops at the last voxel and would miss damage.
            while stream.read(_CHUNK):
                pass
            return volume
    except _DAMAGED as damage:
        # nibabel's texts name the file, and a file's name may be a patient's.
        raise DataError(f"the file is damaged or not NIfTI ({type(damage).__name__}); it was not read") from damage


def read_nifti_geometry(path: Path) -> Volume:
    """Shape and affine of a file, its voxels all zero and taking no memory: only the header is read.

    Raises as `read_nifti` does, for what the header shows.
    """
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream, _silent_nibabel():
            image, shape = _checked(stream)
            return Volume(voxels=np.broadcast_to(np.uint8(0), shape), affine=np.asarray(image.affine, dtype=np.float64))
    except _DAMAGED as damage:
        raise DataError(f"the file is damaged or not NIfTI ({type(damage).__name__}); it was not read") from damage


@contextmanager
def _silent_nibabel() -> Iterator[None]:
    """What is wrong with a header arrives as an exception; nibabel also prints it to stderr."""
    logger = nibabel.imageglobals.logger
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _checked(stream: gzip.GzipFile | io.BufferedReader) -> tuple[Any, tuple[int, ...]]:
    """The image as nibabel has it, and its three-dimensional shape; voxels are not read yet."""
    header_size = stream.read(4)
    stream.seek(0)
    spelling = nibabel.Nifti2Image if header_size in _NIFTI2 else nibabel.Nifti1Image
    image = spelling.from_stream(stream)
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or 0 in shape:
        raise NotThreeDimensional(f"the file holds an array of shape {shape}, not one 3-D volume; it was not read")
    if math.prod(shape) > _MOST_VOXELS:
        raise DataError(f"the header claims {math.prod(shape)} voxels; the file was not read")
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        raise NoOrientation("neither sform nor qform is set, so left and right are unknown; the file was not read")
    return image, shape


def _read(stream: gzip.GzipFile | io.BufferedReader) -> Volume:
    image, shape = _checked(stream)
    voxels = np.asanyarray(image.dataobj).reshape(shape)
    match voxels.dtype.kind:
        case "f":
            with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which ingest refuses by name
                voxels = voxels.astype(np.float32)
        case "i" | "u":
            voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
        case _:
            raise DataError(f"voxels are of type {voxels.dtype}, not numbers; the file was not read")
    return Volume(voxels=voxels, affine=np.asarray(image.affine, dtype=np.float64))


def nifti_bytes(volume: Volume) -> bytes:
    """A gzipped NIfTI-1 file in memory; equal volumes give equal bytes.

    sform and qform both hold the affine, units are millimetres. No name or time is written into the gzip header.
    Raises ValueError for voxels of a type that NIfTI does not know.
    """
    try:
        image = nibabel.Nifti1Image(volume.voxels, volume.affine, dtype=volume.voxels.dtype)
    except HeaderDataError as unknown:
        raise ValueError(f"NIfTI has no voxels of type {volume.voxels.dtype}") from unknown
    image.set_sform(volume.affine, code="scanner")
    image.set_qform(volume.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def write_nifti(path: Path, volume: Volume) -> None:
    """Write a `.nii.gz` file; the folder must exist.

    Not atomic by itself: data sets are built in a temporary folder that is renamed when it is complete.
    Raises ValueError for another suffix, and for voxels of a type that NIfTI does not know (float16, bool).
    """
    if not path.name.endswith(".nii.gz"):
        raise ValueError(f"scans are written as .nii.gz, got the suffix {''.join(path.suffixes)!r}")
    path.write_bytes(nifti_bytes(volume))
