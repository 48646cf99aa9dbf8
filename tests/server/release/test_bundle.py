"""A bundle is complete, is what was audited, and appears whole or not at all."""

import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signed_evidence import receipts_of, record_campaign

from common.errors import ConsiliumError, IntegrityError, UsageError
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import Outcome
from common.evidence.verification import verify_bundle
from common.generator.network import build_generator, weights_of
from common.generator.weights import Weights
from common.settings.study import Study
from common.volume.nifti import read_nifti
from server.release.bundle import (
    Dossier,
    candidates_digest,
    record_decision,
    write_candidates,
    write_refusal,
    write_release,
)
from server.release.evidence import ReleaseEvidence
from server.release.gate import Decision, decide
from server.release.policies import default_policies

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
KEY = Ed25519PrivateKey.generate()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def candidates(tmp_path: Path, study: Study, synthetic: Any) -> Path:
    write_candidates(tmp_path / "candidates", iter(synthetic), study)
    return tmp_path / "candidates"


@pytest.fixture
def decision(evidence: ReleaseEvidence, study: Study, candidates: Path) -> Decision:
    found = decide(replace(evidence, candidates_digest=candidates_digest(candidates)), default_policies(study))
    assert found.outcome is Outcome.RELEASE
    return found


@pytest.fixture
def release(
    tmp_path: Path, study: Study, evidence: ReleaseEvidence, generator_weights: Weights, candidates: Path
) -> Callable[..., Any]:
    """`write_release` to RUN/release for a decision, with anything replaced."""

    def write(decision: Decision, **changes: Any) -> Any:
        page = "<html><body></body></html>"
        dossier = Dossier(study=study, decision=decision, report_html=page, receipts=receipts_of(evidence))
        arguments: dict[str, Any] = {
            "dossier": dossier,
            "candidates": candidates,
            "generator": generator_weights,
            "chain": EvidenceChain(tmp_path / "evidence.jsonl"),
            "key": KEY,
            "now": NOW,
        }
        return write_release(tmp_path / "release", **{**arguments, **changes})

    return write


def test_candidates_say_that_they_are_under_quarantine_and_carry_geometry(candidates: Path):
    assert "quarantine" in (candidates / "QUARANTINE.txt").read_text()
    image = read_nifti(candidates / "sub-synth00001" / "anat" / "sub-synth00001_desc-synthetic_angio.nii.gz")
    label = read_nifti(candidates / "sub-synth00001" / "anat" / "sub-synth00001_desc-synthetic_dseg.nii.gz")
    assert image.spacing_mm == pytest.approx((1.0, 1.0, 2.0))
    assert image.same_geometry(label)
    assert set(np.unique(label.voxels)) <= {0, 1}


def test_the_same_volumes_have_the_same_digest_and_others_do_not(
    tmp_path: Path, candidates: Path, study: Study, synthetic: Any
):
    assert write_candidates(tmp_path / "again", iter(synthetic), study) == candidates_digest(candidates)
    assert write_candidates(tmp_path / "swapped", iter(synthetic[::-1]), study) != candidates_digest(candidates)


def test_a_volume_that_is_not_finite_leaves_no_candidates(tmp_path: Path, study: Study, synthetic: Any):
    broken = synthetic.copy()
    broken[1, 0, 0, 0, 0] = np.nan
    with pytest.raises(IntegrityError, match="volume 2"):
        write_candidates(tmp_path / "candidates", iter(broken), study)
    assert list(tmp_path.iterdir()) == []


def test_a_release_holds_a_bids_derivative_and_everything_to_check_it(released: Path):
    held = names(released)
    assert {
        "README", "desc-synthetic_angio.json", "dataset_description.json", "participants.tsv", "participants.json",
        "dseg.tsv", "dseg.json", ".bidsignore", "croissant.json", "card.md", "card.json", "report.html",
        "decision.json", "generator.safetensors", "generator.json", "evidence.jsonl", "study.json", "manifest.json",
        "attestation.dsse.json", "auditor.pub.pem",
    } == {name for name in held if "/" not in name}  # fmt: skip
    assert len([name for name in held if name.endswith(".nii.gz")]) == 4
    description = json.loads((released / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "Consilium"
    assert (released / "participants.tsv").read_text() == "participant_id\nsub-synth00001\nsub-synth00002\n"


def test_nothing_in_a_release_names_the_seed_or_a_path_of_the_machine(released: Path):
    for name in names(released):
        assert str(released.parent).encode() not in (released / name).read_bytes(), name
    assert "QUARANTINE.txt" not in names(released)


def test_released_candidates_leave_quarantine(released: Path):
    assert not (released.parent / "candidates").exists()


def test_a_refusal_holds_no_volume_and_no_weights_and_leaves_candidates_in_quarantine(refused: Path):
    assert names(refused) == {
        "card.md", "card.json", "report.html", "decision.json",
        "evidence.jsonl", "manifest.json", "attestation.dsse.json", "auditor.pub.pem", "study.json",
        "receipts/site-1.dsse.json", "receipts/site-2.dsse.json",
    }  # fmt: skip
    assert (refused.parent / "candidates" / "QUARANTINE.txt").exists()


def test_a_report_that_does_not_name_its_decision_is_made_to(
    tmp_path: Path, decision: Decision, release: Callable[..., Any]
):
    release(decision)
    page = (tmp_path / "release" / "report.html").read_text()
    assert page.count(decision.id) == 1
    assert page.endswith("</body></html>")


def test_candidates_changed_after_the_audit_are_not_released(
    tmp_path: Path, decision: Decision, candidates: Path, release: Callable[..., Any]
):
    volume = next(candidates.rglob("*.nii.gz"))
    volume.write_bytes(volume.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match="changed after they were audited"):
        release(decision)
    assert not (tmp_path / "release").exists()


def test_weights_that_were_not_audited_are_not_released(
    tmp_path: Path, study: Study, decision: Decision, release: Callable[..., Any]
):
    with pytest.raises(IntegrityError, match="not the one that was audited"):
        release(decision, generator=weights_of(build_generator(study, seed=4)))
    assert not (tmp_path / "release").exists()


def test_receipts_that_the_decision_does_not_name_are_not_released(
    tmp_path: Path, study: Study, evidence: ReleaseEvidence, decision: Decision, release: Callable[..., Any]
):
    one, other = receipts_of(evidence).values()
    for receipts in ({}, {"site-1": one}, {"site-1": other, "site-2": one}):
        dossier = Dossier(study=study, decision=decision, report_html="", receipts=receipts)
        with pytest.raises(IntegrityError, match="not those that the decision names"):
            release(decision, dossier=dossier)
    assert not (tmp_path / "release").exists()


def test_a_refused_decision_cannot_be_released_nor_a_release_refused(
    tmp_path: Path, evidence: ReleaseEvidence, decision: Decision, study: Study, release: Callable[..., Any]
):
    with pytest.raises(ValueError, match="only RELEASE"):
        release(decide(evidence, []))
    dossier = Dossier(study=study, decision=decision, report_html="")
    with pytest.raises(ValueError, match="not written as a refusal"):
        write_refusal(tmp_path / "r", dossier=dossier, chain=EvidenceChain(tmp_path / "e.jsonl"), key=KEY, now=NOW)


def test_a_full_disk_leaves_no_half_release_and_the_candidates_where_they_were(
    tmp_path: Path, evidence: ReleaseEvidence, decision: Decision, candidates: Path, release: Callable[..., Any]
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    record_campaign(EvidenceChain(tmp_path / "evidence.jsonl"), evidence, NOW)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # the weights are larger
    try:
        with pytest.raises(ConsiliumError, match="nothing was left there"):
            release(decision)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"candidates", "evidence.jsonl"}
    release(decision)  # and once there is space again, it works
    assert verify_bundle(tmp_path / "release", trusted_key=None, now=NOW).outcome is Outcome.RELEASE


def test_a_release_never_overwrites(tmp_path: Path, decision: Decision, release: Callable[..., Any]):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "mine").write_bytes(b"precious")
    with pytest.raises(UsageError, match="already holds something"):
        release(decision)
    assert names(tmp_path / "release") == {"mine"}


def test_a_repeated_attempt_records_the_decision_once(tmp_path: Path, decision: Decision):
    chain = EvidenceChain(tmp_path / "evidence.jsonl")
    first = record_decision(chain, decision, NOW)
    assert record_decision(chain, decision, NOW).digest == first.digest
    assert [r.body["outcome"] for r in chain.verify()] == ["RELEASE"]


def test_the_official_validator_has_nothing_to_say_about_a_release(released: Path):
    validator = shutil.which("bids-validator-deno") or str(Path(".venv/bin/bids-validator-deno").absolute())
    if not Path(validator).exists():
        pytest.skip("bids-validator-deno is not installed (extra `bids`)")
    result = subprocess.run([validator, "--json", released], check=False, capture_output=True, text=True)
    told = json.loads(result.stdout)
    assert told["issues"]["issues"] == []  # not even a warning
    assert told["summary"]["subjects"] != []
