"""A release as nnU-Net v2 expects training data, from `consilium release nnunet`."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from signed_evidence import receipts_of

from common.cli import run
from common.errors import IntegrityError, Refusal, UsageError
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import Bypass
from common.evidence.revocation import revoke
from common.evidence.signing import load_signing_key
from common.evidence.verification import Verified, verify_bundle
from common.volume.bids import DatasetKind, write_pair
from common.volume.layouts import find_pairs
from common.volume.volume import Volume
from server.release.bundle import Dossier, candidates_digest, write_unsafe
from server.release.evidence import ReleaseEvidence
from server.release.gate import decide
from server.release.nnunet import NnunetDataset, export_nnunet
from server.release.policies import default_policies
from tests.server.release.conftest import NOW

COMMANDS = [EntryPoint("release nnunet", "server.release.cli:nnunet", "consilium.commands")]
NORMALISING = {"ct", "nonorm", "zscore", "rescale_0_1", "rescale_to_0_1", "rgb_to_0_1"}  # names nnU-Net acts on


@pytest.fixture(scope="module")
def verified(released: Path) -> Verified:
    return verify_bundle(released, trusted_key=None, now=NOW)


@pytest.fixture(scope="module")
def written(released: Path, verified: Verified, tmp_path_factory: pytest.TempPathFactory) -> NnunetDataset:
    return export_nnunet(released, tmp_path_factory.mktemp("raw"), number=501, verified=verified)


@pytest.fixture
def hand_made(tmp_path: Path, released: Path, verified: Verified) -> Callable[..., NnunetDataset]:
    """Lay out a folder with other labels, modality or voxels than the release's, under the release's signature."""

    def lay_out(labels: dict[str, str], voxels: Any = 0, modality: str = "angio", **card: Any) -> NnunetDataset:
        folder = tmp_path / "release"
        grid = np.broadcast_to(np.asarray(voxels, dtype=np.uint8), (8, 8, 8)).copy()
        affine = np.diag([1.0, 2.0, 3.0, 1.0])
        write_pair(
            folder,
            kind=DatasetKind.DERIVATIVE,
            subject="synth00001",
            suffix=modality,
            image=Volume(voxels=grid.astype(np.float32), affine=affine),
            label=Volume(voxels=grid, affine=affine),
        )
        told = json.loads((released / "card.json").read_text())
        told["data"] |= {"labels": labels, "volumes": 1, "modality": modality}
        (folder / "card.json").write_text(json.dumps(told | card))
        shutil.copyfile(released / "card.md", folder / "card.md")
        return export_nnunet(folder, tmp_path / "raw", number=500, verified=verified)

    return lay_out


def labels_in(dataset: NnunetDataset) -> np.ndarray[Any, Any]:
    return np.asarray(nibabel.load(dataset.folder / "labelsTr" / "synth00001.nii.gz").dataobj)  # type: ignore[attr-defined]


def told(dataset: NnunetDataset) -> dict[str, Any]:
    return dict(json.loads((dataset.folder / "dataset.json").read_text()))


# ---- what nnU-Net's documentation asks for


def test_names_and_folders_are_those_of_the_documentation(written: NnunetDataset):
    held = {path.relative_to(written.folder).as_posix() for path in written.folder.rglob("*") if path.is_file()}
    assert written.folder.name == "Dataset501_SyntheticTiny"
    assert held == {
        "dataset.json", "card.md", "PROVENANCE.txt",
        "imagesTr/synth00001_0000.nii.gz", "imagesTr/synth00002_0000.nii.gz",
        "labelsTr/synth00001.nii.gz", "labelsTr/synth00002.nii.gz",
    }  # fmt: skip


def test_dataset_json_states_channels_labels_count_and_ending(written: NnunetDataset):
    facts = told(written)
    assert facts["channel_names"] == {"0": "synthetic angio"}
    assert facts["labels"] == {"background": 0, "vessel": 1}
    assert facts["numTraining"] == 2 == len(list((written.folder / "labelsTr").iterdir()))
    assert facts["file_ending"] == ".nii.gz"


def test_image_and_label_of_a_case_share_shape_and_affine_exactly(written: NnunetDataset):
    for label in sorted((written.folder / "labelsTr").iterdir()):
        case = label.name.removesuffix(".nii.gz")
        mask = nibabel.load(label)  # type: ignore[attr-defined]
        image = nibabel.load(written.folder / "imagesTr" / f"{case}_0000.nii.gz")  # type: ignore[attr-defined]
        assert mask.shape == image.shape == (16, 16, 16)
        assert np.array_equal(mask.affine, image.affine)
        assert mask.header.get_zooms() == image.header.get_zooms() == pytest.approx((1.0, 1.0, 2.0))
        assert np.issubdtype(mask.get_data_dtype(), np.integer)
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


def test_images_keep_every_byte_and_label_maps_every_voxel(written: NnunetDataset, released: Path):
    for pair in find_pairs(released).pairs:
        assert (written.folder / "imagesTr" / f"{pair.patient}_0000.nii.gz").read_bytes() == pair.image.read_bytes()
        before, after = (
            np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
            for path in (pair.label, written.folder / "labelsTr" / f"{pair.patient}.nii.gz")
        )
        assert np.array_equal(before, after)


def test_labels_become_consecutive_in_the_order_of_their_values(hand_made: Callable[..., NnunetDataset]):
    voxels = np.array([0, 2, 10, 200, 0, 2, 10, 200])
    dataset = hand_made({"200": "vein", "10": "artery", "2": "bone"}, voxels=voxels)
    assert told(dataset)["labels"] == {"background": 0, "bone": 1, "artery": 2, "vein": 3}
    assert np.array_equal(labels_in(dataset)[0, 0], [0, 1, 2, 3, 0, 1, 2, 3])
    assert "2 -> 1 bone, 10 -> 2 artery, 200 -> 3 vein" in (dataset.folder / "PROVENANCE.txt").read_text()


@pytest.mark.parametrize("modality", ["CT", "ct", "noNorm", "zscore"])
def test_no_modality_makes_nnunet_take_the_values_for_physical_units(
    hand_made: Callable[..., NnunetDataset], modality: str
):
    channel = told(hand_made({"1": "vessel"}, modality=modality))["channel_names"]["0"]
    assert channel.casefold() not in NORMALISING
    assert modality in channel


def test_what_is_written_is_found_again_as_nnunet_pairs(written: NnunetDataset):
    found = find_pairs(written.folder)
    assert [pair.patient for pair in found.pairs] == ["synth00001", "synth00002"]
    assert found.refused == ()


# ---- what goes with it


def test_the_card_and_where_it_came_from_go_along(written: NnunetDataset, released: Path, verified: Verified):
    text = (written.folder / "PROVENANCE.txt").read_text()
    assert (written.folder / "card.md").read_bytes() == (released / "card.md").read_bytes()
    for words in ("SIMULATED", "SYNTHETIC", verified.digest, verified.predicate.decision_id, "expires 2027-11-20"):
        assert words in text
    assert "the key that came with the release" in text


# ---- what is refused


@pytest.mark.parametrize(
    "labels",
    [{"1": "background"}, {"1": "ignore"}, {"1": "vessel", "2": "vessel"}],
    ids=["background", "ignore", "twice"],
)
def test_labels_that_nnunet_would_read_otherwise_are_refused(
    hand_made: Callable[..., NnunetDataset], tmp_path: Path, labels: dict[str, str]
):
    with pytest.raises(UsageError, match="labels of different names"):
        hand_made(labels)
    assert not (tmp_path / "raw").exists()


def test_a_voxel_of_a_label_that_the_card_does_not_name_is_refused(
    hand_made: Callable[..., NnunetDataset], tmp_path: Path
):
    with pytest.raises(IntegrityError, match="the card's labels"):
        hand_made({"1": "vessel"}, voxels=np.array([0, 0, 0, 3, 0, 0, 0, 0]))
    assert list((tmp_path / "raw").iterdir()) == []


def test_a_number_of_volumes_other_than_the_cards_is_refused(released: Path, tmp_path: Path, verified: Verified):
    folder = Path(shutil.copytree(released, tmp_path / "release"))
    shutil.rmtree(folder / "sub-synth00002")
    with pytest.raises(IntegrityError, match="the volumes its card states"):
        export_nnunet(folder, tmp_path / "raw", number=1, verified=verified)


def test_a_card_of_another_version_is_refused(hand_made: Callable[..., NnunetDataset]):
    with pytest.raises(Refusal, match="not a card of schema"):
        hand_made({"1": "vessel"}, schema_version=0)


def test_a_number_that_is_taken_is_refused_and_other_data_sets_stay(released: Path, tmp_path: Path, verified: Verified):
    (tmp_path / "raw" / "Dataset501_Mine").mkdir(parents=True)
    with pytest.raises(UsageError, match="Dataset501_Mine"):
        export_nnunet(released, tmp_path / "raw", number=501, verified=verified)
    export_nnunet(released, tmp_path / "raw", number=7, verified=verified)
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {"Dataset501_Mine", "Dataset007_SyntheticTiny"}


# ---- the command


@pytest.fixture(scope="module")
def fresh(publish: Any, evidence: ReleaseEvidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that is valid at the time of this test run."""
    return Path(publish(tmp_path_factory.mktemp("fresh"), evidence, now=datetime.now(UTC)))


def export(release: Path, raw: Path, *more: str) -> int:
    return run(["release", "nnunet", str(release), "--out", str(raw), *more], COMMANDS)


def test_the_command_verifies_and_writes(fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert export(fresh, tmp_path / "raw", "--id", "42", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["cases"], facts["labels"]) == (2, {"background": 0, "vessel": 1})
    assert Path(facts["folder"]).name == "Dataset042_SyntheticTiny"


def test_with_a_trusted_key_the_folder_says_so(fresh: Path, tmp_path: Path):
    assert export(fresh, tmp_path / "raw", "--key", str(fresh / "auditor.pub.pem")) == 0
    assert "a key that was trusted" in (tmp_path / "raw" / "Dataset500_SyntheticTiny" / "PROVENANCE.txt").read_text()


def test_a_signed_refusal_is_not_laid_out(refused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert export(refused, tmp_path / "raw") == 1
    assert "is not a release" in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()


def test_an_expired_release_is_not_laid_out(
    publish: Any, evidence: ReleaseEvidence, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    old = publish(tmp_path / "old", evidence, now=datetime.now(UTC) - timedelta(days=366))
    assert export(old, tmp_path / "raw") == 1
    assert "expired" in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()


def test_a_revoked_release_is_not_laid_out(fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    verified = verify_bundle(fresh, trusted_key=None, now=datetime.now(UTC))
    revoke(
        tmp_path / "revoked.json",
        release_digest=verified.digest,
        decision_id=verified.predicate.decision_id,
        reason="a hospital withdrew",
        key=load_signing_key(fresh.parent / "auditor.key"),
        now=datetime.now(UTC),
    )
    assert export(fresh, tmp_path / "raw", "--revocations", str(tmp_path / "revoked.json")) == 1
    assert "a hospital withdrew" in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()


def test_a_refusal_that_somebody_overruled_is_not_laid_out_nor_described_as_a_data_set(
    publish: Any, evidence: ReleaseEvidence, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    now, folder = datetime.now(UTC), tmp_path / "run" / "UNSAFE"
    refusal = publish(tmp_path / "run", replace(evidence, audit=None), now=now)
    candidates = tmp_path / "run" / "candidates"
    unaudited = replace(evidence, audit=None, candidates_digest=candidates_digest(candidates))
    decision = decide(unaudited, default_policies(evidence.study))
    attestation = (refusal / "attestation.dsse.json").read_bytes()
    write_unsafe(
        folder,
        dossier=Dossier(study=evidence.study, decision=decision, report_html="", receipts=receipts_of(evidence)),
        candidates=candidates,
        bypass=Bypass(reason="for a demonstration", refusal=hashlib.sha256(attestation).hexdigest()),
        chain=EvidenceChain(tmp_path / "run" / "evidence.jsonl"),
        key=load_signing_key(tmp_path / "run" / "auditor.key"),
        now=now,
    )
    assert export(folder, tmp_path / "raw") == 1
    assert "is not a release: the gate decided INCONCLUSIVE" in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()
    assert not (folder / "croissant.json").exists()
    assert "UNSAFE" in (folder / "card.md").read_text().splitlines()[2]


def test_a_changed_release_is_not_laid_out(fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = Path(shutil.copytree(fresh, tmp_path / "bundle"))
    volume = next(bundle.rglob("*_dseg.nii.gz"))
    volume.write_bytes(volume.read_bytes() + b"\0")
    assert export(bundle, tmp_path / "raw") == 1
    assert "was changed after it was signed" in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()
