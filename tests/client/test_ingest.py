"""Ingest: every refused file is named with its reason, and no copy of a scan counts for two people."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from client.ingest import Ingested, in_part, ingest
from common.errors import DataError
from common.settings.study import Study
from common.telemetry.events import Event, Progress
from common.volume.layouts import Reason
from tests.tiny_studies import tiny_study

SHAPE = (10, 10, 10)
DATA = Path(os.environ.get("CONSILIUM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
HIPPOCAMPUS = DATA / "segmentation" / "msd_task04_hippocampus"


def study(shape: tuple[int, int, int] = (8, 8, 8), mm: float = 1.0) -> Study:
    return tiny_study(labels={1: "anterior", 2: "posterior"}, grid={"shape": shape, "spacing_mm": (mm, mm, mm)})


def scan(seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A noisy image, and a label map of both structures in its middle."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    label[3:7, 3:5, 3:7], label[3:7, 5:7, 3:7] = 1, 2
    return (100 * rng.random(SHAPE) + 50 * label).astype(np.float32), label


def save(root: Path, case: str, image: NDArray | None, label: NDArray | None, affine: NDArray | None = None) -> None:
    for folder, voxels in (("images", image), ("labels", label)):
        (root / folder).mkdir(exist_ok=True)
        if voxels is not None:
            volume = nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
            nibabel.save(volume, root / folder / f"{case}.nii.gz")


def cohort_with(root: Path, spoil: Callable[[Path], None]) -> Ingested:
    """Two good patients and whatever `spoil` adds."""
    for seed, case in enumerate(("good1", "good2")):
        save(root, case, *scan(seed))
    spoil(root)
    return ingest(root, study())


def refusals(ingested: Ingested) -> list[tuple[str, Reason]]:
    return [(entry.path, entry.reason) for entry in ingested.report.refused]


def test_good_patients_become_float16_pairs_with_all_their_scans(tmp_path: Path) -> None:
    for seed, case in enumerate(("p1", "p2__a", "p2__b")):
        save(tmp_path, case, *scan(seed))
    ingested = ingest(tmp_path, study())
    assert list(ingested.patients) == ["p1", "p2"]
    assert [scans.shape for scans in ingested.patients.values()] == [(1, 3, 8, 8, 8), (2, 3, 8, 8, 8)]
    assert all(scans.dtype == np.float16 for scans in ingested.patients.values())
    assert ingested.report.refused == ()
    assert ingested.report.patients == 2


def not_a_number(root: Path) -> None:
    image, label = scan(9)
    image[0, 0, 0] = np.nan
    save(root, "bad", image, label)


def another_spacing(root: Path) -> None:
    image, label = scan(9)
    save(root, "bad", image, None)
    nibabel.save(nibabel.Nifti1Image(label, np.diag([1, 1, 1.1, 1])), root / "labels" / "bad.nii.gz")


def another_shape(root: Path) -> None:
    image, label = scan(9)
    save(root, "bad", image, label[:-1])


def strange_label(root: Path) -> None:
    image, label = scan(9)
    save(root, "bad", image, np.where(label == 2, 7, label).astype(np.uint8))


def half_label(root: Path) -> None:
    image, label = scan(9)
    save(root, "bad", image, (label * 0.5).astype(np.float32))


def text_file(root: Path) -> None:
    save(root, "bad", None, scan(9)[1])
    (root / "images" / "bad.nii.gz").write_text("no scan")


def text_label(root: Path) -> None:
    save(root, "bad", scan(9)[0], None)
    (root / "labels" / "bad.nii.gz").write_text("no scan")


def label_outside_grid(root: Path) -> None:
    image, label = scan(9)
    corner = np.zeros_like(label)
    corner[0, 0, 0] = 1
    save(root, "bad", image, corner)


@pytest.mark.parametrize(
    ("spoil", "path", "reason"),
    [
        (not_a_number, "images/bad.nii.gz", Reason.NOT_FINITE),
        (another_spacing, "labels/bad.nii.gz", Reason.GEOMETRY),
        (another_shape, "labels/bad.nii.gz", Reason.GEOMETRY),
        (strange_label, "labels/bad.nii.gz", Reason.UNEXPECTED_LABEL),
        (half_label, "labels/bad.nii.gz", Reason.UNEXPECTED_LABEL),
        (text_file, "images/bad.nii.gz", Reason.UNREADABLE),
        (text_label, "labels/bad.nii.gz", Reason.UNREADABLE),
        (label_outside_grid, "labels/bad.nii.gz", Reason.EMPTY_LABEL),
        (lambda root: save(root, "bad", scan(9)[0], 0 * scan(9)[1]), "labels/bad.nii.gz", Reason.EMPTY_LABEL),
        (lambda root: save(root, "bad", scan(9)[0], None), "images/bad.nii.gz", Reason.MISSING_LABEL),
        (lambda root: save(root, "bad", None, scan(9)[1]), "labels/bad.nii.gz", Reason.MISSING_IMAGE),
        (lambda root: save(root, "bad", 0 * scan(9)[0], scan(9)[1]), "images/bad.nii.gz", Reason.CONSTANT_IMAGE),
        (
            lambda root: save(root, "bad", np.stack([scan(9)[0]] * 2, -1), scan(9)[1]),
            "images/bad.nii.gz",
            Reason.NOT_THREE_DIMENSIONAL,
        ),
    ],
)
def test_a_bad_file_is_refused_by_name_and_reason_and_costs_only_its_own_patient(
    tmp_path: Path, spoil: Callable[[Path], None], path: str, reason: Reason
) -> None:
    ingested = cohort_with(tmp_path, spoil)
    assert refusals(ingested) == [(path, reason)]
    assert list(ingested.patients) == ["good1", "good2"]


def test_one_scan_under_two_patients_is_refused_for_both(tmp_path: Path) -> None:
    ingested = cohort_with(tmp_path, lambda root: save(root, "copy", *scan(0)))
    assert refusals(ingested) == [
        ("images/copy.nii.gz", Reason.DUPLICATE_ACROSS_PATIENTS),
        ("images/good1.nii.gz", Reason.DUPLICATE_ACROSS_PATIENTS),
    ]
    assert list(ingested.patients) == ["good2"]


def test_a_copy_is_recognised_in_another_orientation_type_and_scale(tmp_path: Path) -> None:
    def disguised(root: Path) -> None:
        image, label = scan(0)
        image = np.round(image)
        save(root, "good1", image, label)
        flipped = np.flip(image, 0).transpose(2, 0, 1).astype(np.int16)
        affine = np.array([[0, -1.0, 0, 9], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
        save(root, "turned", flipped, np.flip(label, 0).transpose(2, 0, 1).copy(), affine)
        save(root, "louder", 2 * image, label)

    ingested = cohort_with(tmp_path, disguised)
    assert {path for path, reason in refusals(ingested) if reason is Reason.DUPLICATE_ACROSS_PATIENTS} == {
        "images/good1.nii.gz",
        "images/turned.nii.gz",
        "images/louder.nii.gz",
    }
    assert list(ingested.patients) == ["good2"]


def test_a_copy_counts_even_when_its_own_label_is_refused(tmp_path: Path) -> None:
    """Whose scan it is stays unknown, whatever the state of the second label map."""
    ingested = cohort_with(tmp_path, lambda root: save(root, "copy", scan(0)[0], 0 * scan(0)[1]))
    assert list(ingested.patients) == ["good2"]
    assert ("images/good1.nii.gz", Reason.DUPLICATE_ACROSS_PATIENTS) in refusals(ingested)


def test_a_scan_twice_under_one_patient_is_used_once(tmp_path: Path) -> None:
    for case in ("p__a", "p__b"):
        save(tmp_path, case, *scan(0))
    ingested = ingest(tmp_path, study())
    assert ingested.patients["p"].shape[0] == 1
    assert refusals(ingested) == [("images/p__b.nii.gz", Reason.DUPLICATE_WITHIN_PATIENT)]


def test_no_usable_patient_is_an_error_that_counts_the_reasons(tmp_path: Path) -> None:
    save(tmp_path, "a", 0 * scan(0)[0], scan(0)[1])
    save(tmp_path, "b", scan(0)[0], None)
    with pytest.raises(DataError, match="no usable patient") as refusal:
        ingest(tmp_path, study())
    assert "1 image without contrast" in str(refusal.value)
    assert "1 missing label" in str(refusal.value)


def test_an_empty_spelling_is_an_error_not_an_empty_cohort(tmp_path: Path) -> None:
    save(tmp_path, "a", None, None)
    with pytest.raises(DataError, match="no pair was found"):
        ingest(tmp_path, study())


def test_parts_are_disjoint_complete_and_a_function_of_the_patient_alone(tmp_path: Path) -> None:
    for seed in range(8):
        save(tmp_path, f"p{seed}__{seed}", *scan(seed))
    save(tmp_path, "lonely", None, scan(20)[1])
    parts = [ingest(tmp_path, study(), part=(i, 2)) for i in range(2)]
    assert sorted([*parts[0].patients, *parts[1].patients]) == [f"p{i}" for i in range(8)]
    assert all(in_part(p, (i, 2)) for i, part in enumerate(parts) for p in part.patients)
    assert sum(len(part.report.refused) for part in parts) == 1
    with pytest.raises(ValueError, match="index < parts"):
        ingest(tmp_path, study(), part=(2, 2))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_folder_that_is_half_of_someone_elses_hash_split_still_fills_every_part(parts: int) -> None:
    ids = [f"p{i}" for i in range(2000) if hashlib.sha256(f"p{i}".encode()).digest()[-1] % 2 == 0]
    sizes = [sum(in_part(patient, (index, parts)) for patient in ids) for index in range(parts)]
    assert sum(sizes) == len(ids)
    assert min(sizes) > 0.8 * len(ids) / parts


def test_the_report_says_the_same_as_json_and_as_text(tmp_path: Path) -> None:
    ingested = cohort_with(tmp_path, strange_label)
    told = json.loads(ingested.report.to_json())
    assert told["patients"] == 2
    assert told["layout"] == "nnunet"
    assert told["refused"] == [
        {
            "path": "labels/bad.nii.gz",
            "reason": "label values the study does not name",
            "patient": "bad",
            "detail": "values 7",
        }
    ]
    text = ingested.report.to_text()
    assert "used     2 scans of 2 patients" in text
    assert "labels/bad.nii.gz: label values the study does not name (values 7)" in text
    assert "2 RAS" in text


def test_a_structure_cut_off_by_the_grid_is_a_warning(tmp_path: Path) -> None:
    image, label = scan(0)
    label[:] = 1
    save(tmp_path, "wide", image, label)
    report = ingest(tmp_path, study()).report
    assert report.used[0].label_on_grid == pytest.approx(0.512)
    assert "warning: the grid cuts off labelled volume in 1 scans (least kept: 51%)" in report.to_text()


def test_a_name_that_is_not_text_is_refused_and_the_report_can_still_be_written(tmp_path: Path) -> None:
    ingested = cohort_with(tmp_path, lambda root: save(root, "bad\udcff", *scan(9)))
    assert refusals(ingested) == [("images/bad?.nii.gz", Reason.UNPRINTABLE_NAME)]
    (tmp_path / "report.txt").write_text(ingested.report.to_text() + ingested.report.to_json(), encoding="utf-8")


def test_progress_reaches_the_observer(tmp_path: Path) -> None:
    seen: list[Event] = []
    for seed in range(3):
        save(tmp_path, f"p{seed}", *scan(seed))
    ingest(tmp_path, study(), observer=seen.append)
    assert seen == [Progress(task="ingest", done=i, total=3) for i in (1, 2, 3)]


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason=f"real scans absent: {HIPPOCAMPUS} (set CONSILIUM_TEST_DATA)")
def test_real_hippocampi_are_all_used_and_lie_whole_on_the_grid() -> None:
    ingested = ingest(HIPPOCAMPUS, study((32, 32, 32), 1.5), part=(0, 6))
    assert 10 < len(ingested.patients) < 40
    assert ingested.report.refused == ()
    assert min(used.label_on_grid for used in ingested.report.used) > 0.95
    for (pair,) in ingested.patients.values():
        occupied = pair[1:].astype(np.float32)
        place = np.indices((32, 32, 32), dtype=np.float32)
        anterior, posterior = ((place * channel).sum((1, 2, 3)) / channel.sum() for channel in occupied)
        assert anterior[1] > posterior[1]  # axis j runs to the front
        assert anterior[2] < posterior[2]  # the tail rises towards the back
        assert abs(occupied.sum((1, 2, 3)).sum() * 1.5**3 - 3000) < 2000  # mm3, one hippocampus
