"""PET in: lesions come out whole, every bad file is one line of the report, and the other patients stay."""

import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from client.ingest import Ingested, ingest
from common.errors import DataError
from common.settings.site import PartBy
from common.settings.study import Study
from common.volume.layouts import Layout
from tests.tiny_studies import tiny_study

DATA = Path(os.environ.get("CONSILIUM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
STS = DATA / "pet" / "ibsi_sts"
STS_DICOM = DATA / "dicom_bids" / "ibsi_sts_dicom"
real = pytest.mark.skipif(not STS.is_dir(), reason=f"real PET absent: {STS} (set CONSILIUM_TEST_DATA)")
SHAPE = (20, 20, 20)
LEFT_POSTERIOR = np.diag([-4.0, -4.0, 4.0, 1.0])


def study(shape: tuple[int, int, int] = (10, 10, 10), mm: tuple[float, float, float] = (4.0, 4.0, 4.0)) -> Study:
    return tiny_study(
        modality="pet",
        labels={1: "tumour"},
        grid={"shape": shape, "spacing_mm": mm},
        intensity={"kind": "window", "low": 0.0, "high": 10.0},
    )


def save(
    root: Path,
    patient: str,
    seed: int,
    *lesions: tuple[int, int, int],
    mask_affine: np.ndarray | None = None,
    mm: float = 4.0,
) -> None:
    """A patient with lesions of 3 voxels an edge at these places."""
    mask = np.zeros(SHAPE, np.uint8)
    for i, j, k in lesions:
        mask[i : i + 3, j : j + 3, k : k + 3] = 1
    image = np.random.default_rng(seed).random(SHAPE, dtype=np.float32) + 5 * mask
    affine = LEFT_POSTERIOR * [mm / 4, mm / 4, 1, 1]
    (root / patient).mkdir()
    for name, voxels, place in (
        ("image", image, affine),
        ("mask", mask, affine if mask_affine is None else mask_affine),
    ):
        nibabel.save(nibabel.Nifti1Image(voxels, place), root / patient / f"PET_{name}.nii.gz")


def beside_good_ones(root: Path, spoil: Callable[[Path], None]) -> Ingested:
    for seed in range(2):
        save(root, f"good{seed}", seed, (8, 8, 8))
    spoil(root)
    return ingest(root, study())


def lines(ingested: Ingested, kind: str) -> list[str]:
    return [line for line in ingested.report.to_text().splitlines() if line.startswith(kind) and ":" in line]


def moved(by: float) -> np.ndarray:
    affine = LEFT_POSTERIOR.copy()
    affine[2, 3] = by
    return affine


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda root: save(root, "bad", 9), "no labelled voxel on the study's grid"),
        (
            lambda root: save(root, "bad", 9, (8, 8, 8), mask_affine=moved(500.0)),
            "label outside the scan (its field of view lies beside the image's)",
        ),
        (
            lambda root: save(root, "bad", 9, (8, 8, 8), mask_affine=np.diag([-4.0, -4.0, 3.27, 1.0])),
            "image and label differ in geometry (voxels of 4 x 4 x 4 against 4 x 4 x 3.27 mm)",
        ),
        (
            lambda root: save(root, "bad", 9, (8, 8, 8), mask_affine=moved(2.0)),
            "image and label differ in geometry (affines differ)",
        ),
    ],
)
def test_a_mask_that_cannot_be_used_is_one_line_and_costs_its_own_patient(
    tmp_path: Path, spoil: Callable[[Path], None], line: str
) -> None:
    ingested = beside_good_ones(tmp_path, spoil)
    assert lines(ingested, "refused") == [f"refused  bad/PET_mask.nii.gz: {line}"]
    assert list(ingested.patients) == ["good0", "good1"]


def test_two_tumours_are_one_label_and_noted(tmp_path: Path) -> None:
    ingested = beside_good_ones(tmp_path, lambda root: save(root, "two", 9, (6, 6, 6), (11, 11, 11)))
    assert lines(ingested, "note") == [
        "note     two PET_image: 2 separate parts are labelled tumour; all are kept, as one label"
    ]
    assert ingested.patients["two"][0, 1].sum() == pytest.approx(54, rel=0.01)


def test_a_lesion_at_the_edge_of_the_scan_comes_out_whole_and_the_report_says_so(tmp_path: Path) -> None:
    ingested = beside_good_ones(tmp_path, lambda root: save(root, "edge", 9, (17, 8, 0)))
    # Along i the file runs to the left; the grid needs 20 mm more on that side, and 20 mm below, and a voxel around.
    assert lines(ingested, "note") == [
        "note     edge PET_image: the grid lies beside the scan's centre to hold the labels: 24 mm to the left, "
        "24 mm to the bottom"
    ]
    pair = ingested.patients["edge"][0]
    assert pair[1].sum() == pytest.approx(27, rel=0.01)
    assert np.argwhere(pair[1] > 0.5)[[0, -1]].tolist() == [[1, 4, 1], [3, 6, 3]]
    assert (pair[0][pair[1] == 1] > -0.1).all()  # the image moved with its label


def test_a_study_of_another_modality_keeps_the_grid_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for seed, place in enumerate([(8, 8, 8), (17, 8, 0)]):
        save(tmp_path, f"p{seed}", seed, place)
        for name, folder in (("image", "images"), ("mask", "labels")):
            (tmp_path / f"p{seed}" / f"PET_{name}.nii.gz").rename(tmp_path / folder / f"p{seed}.nii.gz")
    ingested = ingest(tmp_path, study().model_copy(update={"modality": "T1w"}))
    assert list(ingested.patients) == ["p0"]


def test_activity_in_place_of_suv_is_noted(tmp_path: Path) -> None:
    save(tmp_path, "p", 0, (8, 8, 8))
    path = tmp_path / "p" / "PET_image.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) * 2000, image.affine), path)
    assert "are hardly SUV; NIfTI is taken as it is" in lines(ingest(tmp_path, study()), "note")[0]


def test_dicom_without_weight_is_one_line_and_the_other_patients_stay(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="DICOM needs the extra `dicom`")
    from tests.dicom_files import box, write_pet, write_structures

    for seed, (patient, weight, z) in enumerate(
        [("good", "70", 25.0), ("outside", "70", 999.0), ("weightless", None, 25.0)]
    ):
        counts = np.random.default_rng(seed).integers(0, 2000, (12, 12, 12)).astype(np.int16)
        write_pet(tmp_path / patient / "pet", counts, PatientWeight=weight, PixelSpacing=[4.0, 4.0])
        write_structures(tmp_path / patient / "rs.dcm", {"GTV": [box((14, 14), (30, 30), z + 5 * k) for k in range(3)]})
    ingested = ingest(tmp_path, study((8, 8, 8)))
    assert ingested.report.layout is Layout.DICOM
    assert list(ingested.patients) == ["good"]
    assert lines(ingested, "refused") == [
        "refused  outside/rs.dcm: label outside the scan "
        "(no voxel of the scan lies inside the contours; no label was read)",
        "refused  weightless/pet: SUV cannot be computed (missing PatientWeight)",
    ]
    assert ingested.patients["good"][0, 1].sum() * 64 == pytest.approx(4 * 4 * 3 * 80, rel=0.1)  # mm3


def test_voxel_sizes_are_shared_out_each_to_one_site(tmp_path: Path) -> None:
    for seed in range(6):
        save(tmp_path, f"p{seed}", seed, (8, 8, 8), mm=4.0 if seed % 2 else 5.5)
    (tmp_path / "p6").mkdir()
    (tmp_path / "p6" / "PET_image.nii.gz").write_text("no scan")
    (tmp_path / "p6" / "PET_mask.nii.gz").write_text("no scan")
    small, large = (ingest(tmp_path, study(), part=(i, 2), part_by=PartBy.SPACING) for i in range(2))
    assert list(small.patients) == ["p1", "p3", "p5"]
    assert list(large.patients) == ["p0", "p2", "p4"]
    assert [len(site.report.refused) for site in (small, large)] == [1, 0]
    with pytest.raises(DataError, match="2 voxel sizes and are to be split by them into 3 sites"):
        ingest(tmp_path, study(), part=(0, 3), part_by=PartBy.SPACING)


@real
@pytest.mark.parametrize(
    ("shape", "mm"),
    [((64, 64, 32), (4.0, 4.0, 5.5)), ((32, 32, 16), (6.0, 6.0, 11.0)), ((32, 32, 32), (6.0, 6.0, 6.0))],
)
def test_every_real_tumour_lies_whole_on_the_grid(
    shape: tuple[int, int, int], mm: tuple[float, float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    ingested = ingest(STS, study(shape, mm))
    kept = [scan.label_on_grid for scan in ingested.report.used]
    with capsys.disabled():
        print(f"\n{len(kept)} PET scans on {shape} of {mm} mm: least of a tumour on the grid {min(kept):.3f}")
    assert len(ingested.patients) == 25
    assert ingested.report.refused == ()
    assert min(kept) > 0.95
    # Uptake inside the tumour is above that around it, so image and label lie on each other.
    inside, outside = zip(
        *((pair[0][pair[1] > 0.5].mean(), pair[0][pair[1] == 0].mean()) for (pair,) in ingested.patients.values()),
        strict=True,
    )
    assert np.mean(np.greater(inside, outside)) > 0.95


@real
def test_the_real_patients_form_three_sites_by_voxel_size() -> None:
    sites = [ingest(STS, study(), part=(i, 3), part_by=PartBy.SPACING) for i in range(3)]
    assert [len(site.patients) for site in sites] == [7, 6, 12]
    assert [{round(scan.spacing_mm[0], 1) for scan in site.report.used} for site in sites] == [{3.9}, {4.7}, {5.5}]


@real
@pytest.mark.skipif(not STS_DICOM.is_dir(), reason=f"real DICOM absent: {STS_DICOM} (set CONSILIUM_TEST_DATA)")
def test_the_same_patient_is_prepared_alike_from_dicom_and_from_nifti() -> None:
    pytest.importorskip("pydicom", reason="DICOM needs the extra `dicom`")
    nifti, dicom = ingest(STS, study()), ingest(STS_DICOM, study())
    assert dicom.report.refused == ()
    np.testing.assert_allclose(dicom.patients["STS_019"], nifti.patients["STS_019"], atol=2e-3)
