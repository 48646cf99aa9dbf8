"""Folders in three spellings: who belongs to whom, and every file that belongs to nobody is named."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.volume.layouts import Layout, Reason, find_pairs


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(root: Path, **how: str) -> list[tuple[str, str, str, str]]:
    found = find_pairs(root, **how).pairs
    return [
        (p.patient, p.scan, p.image.relative_to(root).as_posix(), p.label.relative_to(root).as_posix()) for p in found
    ]


def refused(root: Path, **how: str) -> list[tuple[str, Reason]]:
    return [(entry.path.relative_to(root).as_posix(), entry.reason) for entry in find_pairs(root, **how).refused]


@pytest.mark.parametrize(("images", "labels"), [("imagesTr", "labelsTr"), ("images", "labels")])
def test_nnunet_pairs_by_case_name_with_or_without_channel(tmp_path: Path, images: str, labels: str) -> None:
    touch(tmp_path, f"{images}/a_0000.nii.gz", f"{labels}/a.nii.gz", f"{images}/b.nii", f"{labels}/b.nii.gz")
    assert pairs(tmp_path) == [
        ("a", "a", f"{images}/a_0000.nii.gz", f"{labels}/a.nii.gz"),
        ("b", "b", f"{images}/b.nii", f"{labels}/b.nii.gz"),
    ]


def test_four_digits_that_belong_to_the_case_name_are_not_a_channel(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "images/case_0000.nii.gz",
        "labels/case_0000.nii.gz",
        "images/case_0001.nii.gz",
        "labels/case_0001.nii.gz",
    )
    assert [p[0] for p in pairs(tmp_path)] == ["case_0000", "case_0001"]
    assert refused(tmp_path) == []


def test_nnunet_names_every_file_without_partner(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "images/a_0000.nii.gz",
        "images/a_0001.nii.gz",
        "labels/a.nii.gz",
        "images/x.nii.gz",
        "labels/y.nii.gz",
    )
    assert refused(tmp_path) == [
        ("images/a_0001.nii.gz", Reason.OTHER_CHANNEL),
        ("images/x.nii.gz", Reason.MISSING_LABEL),
        ("labels/y.nii.gz", Reason.MISSING_IMAGE),
    ]


def test_several_scans_of_one_nnunet_patient(tmp_path: Path) -> None:
    for case in ("p07__a", "p07__b", "p07_ses-2", "p08", "__odd"):
        touch(tmp_path, f"images/{case}.nii.gz", f"labels/{case}.nii.gz")
    assert [p[:2] for p in pairs(tmp_path)] == [
        ("__odd", "__odd"),
        ("p07", "a"),
        ("p07", "b"),
        ("p07", "ses-2"),
        ("p08", "p08"),
    ]


def test_two_files_of_one_name_are_both_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii", "images/a.nii.gz", "labels/a.nii.gz", "images/b.nii", "labels/b.nii")
    assert [p[0] for p in pairs(tmp_path)] == ["b"]
    assert ("images/a.nii", Reason.NAMED_TWICE) in refused(tmp_path)
    assert ("images/a.nii.gz", Reason.NAMED_TWICE) in refused(tmp_path)


def test_shadow_files_of_macos_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "images/._a.nii.gz", "labels/._a.nii.gz")
    assert len(pairs(tmp_path)) == 1
    assert refused(tmp_path) == []


def test_bids_takes_sub_as_patient_and_finds_labels_beside_or_in_derivatives(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_desc-manual_dseg.nii.gz",
        "derivatives/seg/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz",
        "derivatives/seg/sub-01/ses-2/anat/sub-01_ses-2_label-hippocampus_mask.nii.gz",
        "derivatives/seg/sub-01/ses-2/anat/sub-01_ses-2_desc-preproc_T1w.nii.gz",
    )
    found = pairs(tmp_path)
    assert [(p[0], p[1], Path(p[3]).name) for p in found] == [
        ("01", "ses-1_T1w", "sub-01_ses-1_dseg.nii.gz"),
        ("01", "ses-2_T1w", "sub-01_ses-2_label-hippocampus_mask.nii.gz"),
        ("02", "T1w", "sub-02_desc-manual_dseg.nii.gz"),
    ]
    assert refused(tmp_path) == []


def test_a_bids_derivative_of_ours_is_read_back(tmp_path: Path) -> None:
    folder = "sub-synth00001/anat/sub-synth00001_desc-synthetic"
    touch(tmp_path, f"{folder}_angio.nii.gz", f"{folder}_dseg.nii.gz")
    assert [p[:2] for p in pairs(tmp_path, suffix="angio")] == [("synth00001", "desc-synthetic_angio")]


def test_bids_labels_follow_run_and_modality(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-01/anat/sub-01_run-1_T1w.nii.gz",
        "sub-01/anat/sub-01_run-2_T1w.nii.gz",
        "sub-01/anat/sub-01_run-1_dseg.nii.gz",
        "sub-01/anat/sub-01_run-2_mod-T1w_dseg.nii.gz",
        "sub-01/anat/sub-01_run-2_T2w.nii.gz",
    )
    assert [(p[1], Path(p[3]).name) for p in pairs(tmp_path, suffix="T1w")] == [
        ("run-1_T1w", "sub-01_run-1_dseg.nii.gz"),
        ("run-2_T1w", "sub-01_run-2_mod-T1w_dseg.nii.gz"),
    ]


def test_bids_never_guesses_between_label_maps_or_images(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_label-a_mask.nii.gz",
        "sub-01/anat/sub-01_label-b_mask.nii.gz",
        "sub-02/anat/sub-02_run-1_T1w.nii.gz",
        "sub-02/anat/sub-02_run-2_T1w.nii.gz",
        "sub-02/anat/sub-02_dseg.nii.gz",
        "sub-03/anat/sub-03_dseg.nii.gz",
        "sub-03/anat/sub-04_T1w.nii.gz",
    )
    assert pairs(tmp_path) == []
    assert refused(tmp_path) == [
        ("sub-01/anat/sub-01_T1w.nii.gz", Reason.AMBIGUOUS_LABEL),
        ("sub-02/anat/sub-02_run-1_T1w.nii.gz", Reason.MISSING_LABEL),
        ("sub-02/anat/sub-02_run-2_T1w.nii.gz", Reason.MISSING_LABEL),
        ("sub-03/anat/sub-03_dseg.nii.gz", Reason.MISSING_IMAGE),
        ("sub-03/anat/sub-04_T1w.nii.gz", Reason.WRONG_FOLDER),
    ]


def test_a_bids_folder_without_the_studys_modality_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_dseg.nii.gz")
    with pytest.raises(DataError, match="_angio"):
        find_pairs(tmp_path, suffix="angio")


def test_a_manifest_names_pairs_whatever_the_spreadsheet_wrote(tmp_path: Path) -> None:
    touch(tmp_path, "x/one.nii.gz", "x/two.nii.gz", "l.nii.gz")
    (tmp_path / "manifest.csv").write_text(
        "\ufeffPatient; Image;label;scan\r\nA;x/one.nii.gz;l.nii.gz;\r\nA;x/two.nii.gz; l.nii.gz;late\r\n",
        encoding="utf-8",
    )
    assert find_pairs(tmp_path).layout is Layout.MANIFEST
    assert pairs(tmp_path) == [("A", "late", "x/two.nii.gz", "l.nii.gz"), ("A", "one", "x/one.nii.gz", "l.nii.gz")]


@pytest.mark.parametrize("path", ["../i.nii", "x/../../i.nii", "/etc/passwd", "..\\i.nii", "C:\\i.nii"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, path: str) -> None:
    touch(tmp_path, "i.nii", "in/l.nii")
    (tmp_path / "in" / "manifest.csv").write_text(f"patient,image,label\nA,{path},l.nii\nB,l.nii,{path}\n")
    assert pairs(tmp_path / "in") == []
    assert [reason for _, reason in refused(tmp_path / "in")] == [Reason.OUTSIDE_FOLDER] * 2


def test_every_unusable_manifest_row_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "i.nii", "l.nii")
    (tmp_path / "manifest.csv").write_text(
        "patient,image,label\n,i.nii,l.nii\nA,i.nii,\nB,none.nii,l.nii\nC,i.nii,none.nii\nD,i.nii,l.nii\nD,i.nii,l.nii\nE,i.nii\n"
    )
    found = find_pairs(tmp_path)
    assert found.pairs == ()
    assert sorted((entry.patient or "", entry.reason.value) for entry in found.refused) == sorted(
        [
            ("", Reason.INCOMPLETE_ROW.value),
            ("A", Reason.INCOMPLETE_ROW.value),
            ("B", Reason.MISSING_IMAGE.value),
            ("C", Reason.MISSING_LABEL.value),
            ("D", Reason.NAMED_TWICE.value),
            ("D", Reason.NAMED_TWICE.value),
            ("E", Reason.INCOMPLETE_ROW.value),
        ]
    )


@pytest.mark.parametrize("text", ["patient,image\nA,i\n", "", 'patient,image,label\n"A,i,l\n'])
def test_a_manifest_that_is_not_a_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.csv"):
        find_pairs(tmp_path)


def test_a_folder_in_no_spelling_is_told_the_three(tmp_path: Path) -> None:
    touch(tmp_path, "scan.nii.gz")
    with pytest.raises(DataError, match=r"manifest\.csv.*BIDS.*nnU-Net"):
        find_pairs(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        find_pairs(tmp_path / "absent")


def test_pet_files_are_taken_by_name_and_other_modalities_ignored(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "p1/PET_image.nii.gz",
        "p1/PET_mask.nii.gz",
        "p1/CT_image.nii.gz",
        "p1/CT_mask.nii.gz",
        "p2/PET_image.nii.gz",
        "p3/PET_mask.nii.gz",
        "p4/PET_image.nii.gz",
        "p4/PET_image.nii",
        "p4/PET_mask.nii.gz",
        "p5/MR_T1_image.nii.gz",
    )
    assert find_pairs(tmp_path).layout is Layout.PET
    assert pairs(tmp_path, suffix="pet") == [("p1", "PET_image", "p1/PET_image.nii.gz", "p1/PET_mask.nii.gz")]
    assert refused(tmp_path) == [
        ("p2/PET_image.nii.gz", Reason.MISSING_LABEL),
        ("p3/PET_mask.nii.gz", Reason.MISSING_IMAGE),
        ("p4/PET_image.nii", Reason.NAMED_TWICE),
        ("p4/PET_image.nii.gz", Reason.NAMED_TWICE),
    ]


def test_a_pet_folder_is_refused_for_a_study_of_another_modality(tmp_path: Path) -> None:
    touch(tmp_path, "p1/PET_image.nii.gz", "p1/PET_mask.nii.gz")
    with pytest.raises(DataError, match="holds PET; the study's modality is T1w"):
        find_pairs(tmp_path, suffix="T1w")


def test_dicom_masks_follow_the_series_or_else_the_frame_that_they_are_drawn_on(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="DICOM needs the extra `dicom`")
    from tests.dicom_files import write_pet, write_structures

    counts = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    write_pet(tmp_path / "p1" / "pet", counts)
    write_structures(tmp_path / "p1" / "rs" / "own.dcm", {"GTV": []})
    write_structures(tmp_path / "p1" / "rs" / "ct.dcm", {"GTV": []}, series="7.7")
    write_pet(tmp_path / "p2", counts)
    write_structures(tmp_path / "p2" / "ct.dcm", {"GTV": []}, series="7.7")
    write_pet(tmp_path / "p3", counts)
    write_structures(tmp_path / "p3" / "other.dcm", {"GTV": []}, series="7.7", frame="7.8")
    write_pet(tmp_path / "p4", counts)
    for name in ("a", "b"):
        write_structures(tmp_path / "p4" / f"{name}.dcm", {"GTV": []})
    write_pet(tmp_path / "p5" / "ct", counts, Modality="CT")
    touch(tmp_path, "p6/broken.dcm")
    assert find_pairs(tmp_path).layout is Layout.DICOM
    assert pairs(tmp_path) == [("p1", "pet", "p1/pet", "p1/rs/own.dcm"), ("p2", "p2", "p2", "p2/ct.dcm")]
    assert refused(tmp_path) == [
        ("p3", Reason.MISSING_LABEL),
        ("p4", Reason.AMBIGUOUS_LABEL),
        ("p5", Reason.MISSING_IMAGE),
        ("p6/broken.dcm", Reason.UNREADABLE),
    ]
