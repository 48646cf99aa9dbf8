"""BIDS data sets: names and root files that the validator accepts, and bytes that do not depend on when."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.volume.bids import (
    DatasetDescription,
    DatasetKind,
    subject_name,
    write_dataset,
    write_image_facts,
    write_pair,
)
from common.volume.layouts import find_pairs
from common.volume.nifti import read_nifti
from common.volume.volume import Grid, Volume

GRID = Grid(shape=(8, 9, 10), spacing_mm=(1.0, 1.5, 2.0))
IMAGE = Volume(voxels=np.linspace(-1, 1, 720, dtype=np.float32).reshape(8, 9, 10), affine=GRID.affine)
LABEL = Volume(voxels=(IMAGE.voxels > 0).astype(np.uint8), affine=GRID.affine)


def description(kind: DatasetKind) -> DatasetDescription:
    return DatasetDescription(
        kind=kind,
        name="Vessels",
        readme="SYNTHETIC: nobody was scanned.",
        labels={2: "vein", 1: "artery"},
        generator="Consilium",
        generator_version="0.1.0",
        licence="CC-BY-4.0",
        ignored=("manifest.json",),
        extra={"SyntheticData": True},
    )


def write(root: Path, kind: DatasetKind) -> dict[str, bytes]:
    rows = {subject_name(n): {"generator": "wgan"} for n in (2, 1)}
    write_dataset(root, description=description(kind), participants=rows)
    for subject in rows:
        write_pair(root, kind=kind, subject=subject, suffix="angio", image=IMAGE, label=LABEL)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_derivative_has_the_names_and_root_files_of_the_specification(tmp_path: Path) -> None:
    files = write(tmp_path, DatasetKind.DERIVATIVE)
    assert sorted(files) == [
        ".bidsignore",
        "README",
        "dataset_description.json",
        "dseg.json",
        "dseg.tsv",
        "participants.json",
        "participants.tsv",
        "sub-synth00001/anat/sub-synth00001_desc-synthetic_angio.nii.gz",
        "sub-synth00001/anat/sub-synth00001_desc-synthetic_dseg.nii.gz",
        "sub-synth00002/anat/sub-synth00002_desc-synthetic_angio.nii.gz",
        "sub-synth00002/anat/sub-synth00002_desc-synthetic_dseg.nii.gz",
    ]
    told = json.loads(files["dataset_description.json"])
    assert told["DatasetType"] == "derivative"
    assert told["GeneratedBy"] == [{"Name": "Consilium", "Version": "0.1.0"}]
    assert told["SyntheticData"] is True
    assert files["dseg.tsv"] == b"index\tname\n0\tbackground\n1\tartery\n2\tvein\n"
    assert files["participants.tsv"] == b"participant_id\tgenerator\nsub-synth00001\twgan\nsub-synth00002\twgan\n"
    assert files[".bidsignore"] == b"manifest.json\n"


def test_every_image_of_a_derivative_inherits_what_the_specification_asks_of_it(tmp_path: Path) -> None:
    write_image_facts(tmp_path, suffix="angio")
    (told,) = tmp_path.iterdir()
    assert told.name == "desc-synthetic_angio.json"  # each image's name without its subject
    assert json.loads(told.read_text())["SkullStripped"] is False
    with pytest.raises(ValueError, match="letters and digits"):
        write_image_facts(tmp_path, suffix="../up")


def test_a_raw_data_set_keeps_label_maps_among_its_derivatives(tmp_path: Path) -> None:
    files = write(tmp_path, DatasetKind.RAW)
    assert json.loads(files["dataset_description.json"])["DatasetType"] == "raw"
    assert json.loads(files["derivatives/labels/dataset_description.json"])["DatasetType"] == "derivative"
    assert "sub-synth00001/anat/sub-synth00001_angio.nii.gz" in files
    assert "derivatives/labels/sub-synth00001/anat/sub-synth00001_dseg.nii.gz" in files


@pytest.mark.parametrize("kind", list(DatasetKind))
def test_what_is_written_is_found_and_read_back(tmp_path: Path, kind: DatasetKind) -> None:
    write(tmp_path, kind)
    found = find_pairs(tmp_path, suffix="angio")
    assert [pair.patient for pair in found.pairs] == ["synth00001", "synth00002"]
    assert found.refused == ()
    np.testing.assert_array_equal(read_nifti(found.pairs[0].image).voxels, IMAGE.voxels)
    label = read_nifti(found.pairs[0].label)
    assert label.voxels.dtype == np.uint8
    np.testing.assert_allclose(label.affine, GRID.affine)


@pytest.mark.parametrize("kind", list(DatasetKind))
def test_writing_twice_gives_the_same_bytes(tmp_path: Path, kind: DatasetKind) -> None:
    assert write(tmp_path / "a", kind) == write(tmp_path / "b", kind)


@pytest.mark.parametrize("name", ["", "a-b", "a_b", "../up", "ä"])
def test_names_that_bids_does_not_allow_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="letters and digits"):
        write_pair(tmp_path, kind=DatasetKind.RAW, subject=name, suffix="angio", image=IMAGE, label=LABEL)
    with pytest.raises(ValueError, match="letters and digits"):
        write_pair(tmp_path, kind=DatasetKind.RAW, subject="a", suffix=name, image=IMAGE, label=LABEL)
    with pytest.raises(ValueError, match="letters and digits"):
        write_dataset(tmp_path, description=description(DatasetKind.RAW), participants={name: {}})


def test_a_pair_of_different_geometry_is_not_written(tmp_path: Path) -> None:
    other = Volume(voxels=LABEL.voxels, affine=np.eye(4))
    with pytest.raises(ValueError, match="different voxel grids"):
        write_pair(tmp_path, kind=DatasetKind.RAW, subject="a", suffix="angio", image=IMAGE, label=other)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [{"a": {"x": "1\t2"}}, {"a": {"x\n": "1"}}, {"a": {"x": "1"}, "b": {"y": "1"}}])
def test_a_participants_table_that_would_not_parse_is_refused(tmp_path: Path, rows: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ValueError, match=r"participants"):
        write_dataset(tmp_path, description=description(DatasetKind.RAW), participants=rows)


def test_sessions_become_folders_and_entities(tmp_path: Path) -> None:
    image, label = write_pair(
        tmp_path, kind=DatasetKind.RAW, subject="01", session="2", suffix="T1w", image=IMAGE, label=LABEL
    )
    assert image.relative_to(tmp_path).as_posix() == "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz"
    assert label.name == "sub-01_ses-2_dseg.nii.gz"
    assert [pair.scan for pair in find_pairs(tmp_path).pairs] == ["ses-2_T1w"]
