"""A PET series and its structures against the same case as NIfTI, and against series written here."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from common.volume.nifti import read_nifti
from common.volume.suv import NoSuv

pydicom = pytest.importorskip("pydicom", reason="DICOM needs the extra `dicom`")

from common.volume.dicom import AmbiguousMask, MaskOutside, describe, pet_in_plane_mm, read_pet, read_structures  # noqa: E402
from tests.dicom_files import SERIES, box, write_pet, write_structures  # noqa: E402

DATA = Path(os.environ.get("CONSILIUM_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
CASE = DATA / "dicom_bids" / "ibsi_sts_dicom" / "STS_019" / "PET"
SAME_CASE = DATA / "pet" / "ibsi_sts" / "STS_019"
real = pytest.mark.skipif(
    not (CASE.is_dir() and SAME_CASE.is_dir()), reason=f"real PET absent: {CASE}, {SAME_CASE} (set CONSILIUM_TEST_DATA)"
)
COUNTS = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)  # slices, rows, columns
FACTOR = 70_000 / (3.7e8 * 2 ** (-3600 / 6586.2))


@real
def test_a_real_series_equals_the_same_case_as_nifti(capsys: pytest.CaptureFixture[str]) -> None:
    image, expected = read_pet(CASE / "image"), read_nifti(SAME_CASE / "PET_image.nii.gz")
    error = np.abs(image.voxels - expected.voxels) / np.maximum(np.abs(expected.voxels), 1e-3)
    with capsys.disabled():
        print(f"\nSUV of the DICOM series against NIfTI: largest relative difference {error.max():.1e}")
    assert image.same_geometry(expected)
    assert error.max() < 1e-5


@real
def test_real_contours_give_the_mask_of_the_same_case(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = read_structures(CASE / "mask" / "RS.dcm", read_pet(CASE / "image")).voxels > 0
    expected = read_nifti(SAME_CASE / "PET_mask.nii.gz").voxels > 0
    dice = 2 * (drawn & expected).sum() / (drawn.sum() + expected.sum())
    with capsys.disabled():
        print(f"\nmask of the RTSTRUCT against NIfTI: Dice {dice:.4f}, {drawn.sum()} and {expected.sum()} voxels")
    assert dice >= 0.95


@real
def test_the_real_series_as_activity_gives_the_same_suv(tmp_path: Path) -> None:
    """The public series is stored as SUV; written back as becquerels by its own dose, weight and times."""
    for path in sorted((CASE / "image").glob("*.dcm")):
        one = pydicom.dcmread(path)
        dose = one.RadiopharmaceuticalInformationSequence[0]
        clock = "%H%M%S.%f"
        waited = datetime.strptime(one.SeriesTime, clock) - datetime.strptime(dose.RadiopharmaceuticalStartTime, clock)
        left = float(dose.RadionuclideTotalDose) * 2 ** (-waited.total_seconds() / float(dose.RadionuclideHalfLife))
        one.Units, one.DecayCorrection = "BQML", "START"
        one.RescaleSlope = f"{float(one.RescaleSlope) * left / (1000 * float(one.PatientWeight)):.10g}"
        one.save_as(tmp_path / path.name)
    expected = read_nifti(SAME_CASE / "PET_image.nii.gz").voxels
    np.testing.assert_allclose(read_pet(tmp_path).voxels, expected, rtol=1e-5, atol=1e-6)


def test_slices_are_sorted_by_place_scaled_each_by_its_slope_and_turned_to_ras(tmp_path: Path) -> None:
    volume = read_pet(write_pet(tmp_path, COUNTS, slopes=(1.0, 2.0, 3.0)))
    expected = (COUNTS * np.array([1, 2, 3])[:, None, None] * FACTOR).transpose(2, 1, 0)
    np.testing.assert_allclose(volume.voxels, expected, rtol=1e-6)
    # Columns run to the patient's left, rows to the back: both against RAS.
    np.testing.assert_allclose(volume.affine, np.diag([-3.0, -4.0, 5.0, 1.0]))
    assert pet_in_plane_mm(tmp_path) == (3.0, 4.0)


def test_a_sagittal_series_lies_where_its_header_says(tmp_path: Path) -> None:
    write_pet(tmp_path, COUNTS, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    for path in tmp_path.iterdir():
        one = pydicom.dcmread(path)
        one.ImagePositionPatient = [float(one.ImagePositionPatient[2]), 7.0, 9.0]
        one.save_as(path)
    volume = read_pet(tmp_path)
    # The normal of (back, down) points to the right, so slices are counted from the left: the last written is first.
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [-10, -7, 9, 1])
    np.testing.assert_allclose(volume.affine @ [1, 2, 2, 1], [0, -10, 1, 1])
    np.testing.assert_allclose(volume.voxels[:, :, 0], COUNTS[2].T * FACTOR, rtol=1e-6)


@pytest.mark.parametrize(
    ("header", "dose", "what"),
    [
        ({"PatientWeight": None}, {}, "missing PatientWeight"),
        ({}, {"RadionuclideTotalDose": None}, "missing RadionuclideTotalDose"),
        ({}, {"RadionuclideHalfLife": None}, "missing RadionuclideHalfLife"),
        ({}, {"RadiopharmaceuticalStartTime": None}, "missing RadiopharmaceuticalStartTime"),
        ({"Units": "PROPCPS"}, {}, "Units is none of BQML, CNTS, GML"),
    ],
)
def test_a_header_without_what_suv_needs_is_refused_by_keyword(
    tmp_path: Path, header: dict[str, Any], dose: dict[str, Any], what: str
) -> None:
    with pytest.raises(NoSuv) as refusal:
        read_pet(write_pet(tmp_path, COUNTS, dose=dose, **header))
    assert refusal.value.what == what


def test_midnight_between_injection_and_scan_costs_nothing(tmp_path: Path) -> None:
    times = {"SeriesTime": "003000", "AcquisitionTime": "003000"}
    volume = read_pet(write_pet(tmp_path, COUNTS, dose={"RadiopharmaceuticalStartTime": "233000"}, **times))
    np.testing.assert_allclose(volume.voxels[1, 0, 0], FACTOR, rtol=1e-6)


def test_midnight_within_a_series_without_dates_costs_nothing(tmp_path: Path) -> None:
    times = {"SeriesTime": "235900", "AcquisitionTime": "001000", "SeriesDate": None, "AcquisitionDate": None}
    volume = read_pet(write_pet(tmp_path, COUNTS, dose={"RadiopharmaceuticalStartTime": "225900"}, **times))
    np.testing.assert_allclose(volume.voxels[1, 0, 0], FACTOR, rtol=1e-6)


def gap(folder: Path) -> None:
    write_pet(folder, np.concatenate([COUNTS, COUNTS]))
    (folder / "003.dcm").unlink()


def two_series(folder: Path) -> None:
    write_pet(folder, COUNTS)
    one = pydicom.dcmread(folder / "001.dcm")
    one.SeriesInstanceUID = "9.9"
    one.save_as(folder / "001.dcm")


def damaged(folder: Path) -> None:
    write_pet(folder, COUNTS)
    (folder / "001.dcm").write_bytes(b"no scan")


def cut_short(folder: Path) -> None:
    write_pet(folder, COUNTS)
    (folder / "001.dcm").write_bytes((folder / "001.dcm").read_bytes()[:-20])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (gap, "slices are missing, doubled or unevenly spaced"),
        (two_series, "slices of several series"),
        (damaged, "damaged or not DICOM"),
        (cut_short, "cannot be used"),
        (lambda folder: write_pet(folder, COUNTS[:1]), "1 DICOM slices are no volume"),
        (lambda folder: write_pet(folder, COUNTS, Modality="CT"), "a slice is no PET image"),
        (
            lambda folder: write_pet(folder, COUNTS, PixelSpacing=None),
            "missing PixelSpacing|PixelSpacing|AttributeError",
        ),
    ],
)
def test_what_is_no_complete_series_is_refused(tmp_path: Path, spoil: Any, told: str) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError, match=told):
        read_pet(tmp_path)


def test_tumours_are_one_label_and_other_structures_are_left_out(tmp_path: Path) -> None:
    image = read_pet(write_pet(tmp_path / "pet", np.zeros((3, 8, 8), np.int16) + COUNTS[0, 0, 1]))
    two = {
        "GTVp": [box((-1, -1), (4, 5), 0.0)],
        "gtv node": [box((14, 18), (22, 29), 5.0)],
        "BODY": [box((-1, -1), (29, 29), z) for z in (0.0, 5.0, 10.0)],
    }
    mask = read_structures(write_structures(tmp_path / "rs.dcm", two), image)
    assert mask.same_geometry(image)
    assert np.argwhere(mask.voxels[:, :, 0]).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert np.argwhere(mask.voxels[:, :, 1]).tolist() == [[i, j] for i in (5, 6, 7) for j in (5, 6, 7)]
    assert mask.voxels[:, :, 2].sum() == 0


def test_structures_outside_open_or_unnamed_are_refused(tmp_path: Path) -> None:
    image = read_pet(write_pet(tmp_path / "pet", COUNTS))
    with pytest.raises(MaskOutside):
        read_structures(write_structures(tmp_path / "a.dcm", {"GTV": [box((0, 0), (9, 9), 500.0)]}), image)
    with pytest.raises(AmbiguousMask, match="2 structures and none is named GTV"):
        read_structures(write_structures(tmp_path / "b.dcm", {"A": [], "B": []}), image)
    with pytest.raises(DataError, match="planes of the image"):
        read_structures(write_structures(tmp_path / "c.dcm", {"A": [[(0, 0, 0), (9, 0, 9), (9, 9, 9)]]}), image)
    with pytest.raises(DataError, match="is no RTSTRUCT"):
        read_structures(tmp_path / "pet" / "001.dcm", image)
    assert read_structures(write_structures(tmp_path / "d.dcm", {"A": []}), image).voxels.sum() == 0


def test_a_header_says_what_a_file_is(tmp_path: Path) -> None:
    write_pet(tmp_path, COUNTS)
    (tmp_path / "text.dcm").write_text("no scan")
    assert describe(tmp_path / "001.dcm").modality == "PT"
    assert describe(write_structures(tmp_path / "rs.dcm", {"A": []})).shown_series == (SERIES,)
    assert describe(tmp_path / "text.dcm").modality == ""
