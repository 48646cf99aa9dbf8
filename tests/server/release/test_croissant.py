"""What a data catalogue reads of a release: valid Croissant 1.1, and nothing in it that is not so."""

import fnmatch
import hashlib
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlcroissant
import pytest

from common.evidence.predicate import Predicate
from common.settings.study import Study
from server.release.card import card_facts
from server.release.croissant import croissant_facts
from server.release.evidence import ReleaseEvidence
from server.release.gate import decide
from server.release.policies import default_policies
from tests.server.release.conftest import NOW

pytestmark = pytest.mark.filterwarnings("ignore:ConjunctiveGraph:DeprecationWarning")  # mlcroissant's own use of rdflib

# What Croissant 1.1 requires of every data set, and RAI properties that exist (misspelt ones are ignored by readers).
REQUIRED = {"@context", "@type", "conformsTo", "description", "license", "name", "url", "creator", "datePublished"}
RESPONSIBLE = {
    "annotationsPerItem", "annotatorDemographics", "dataAnnotationAnalysis", "dataAnnotationPlatform",
    "dataAnnotationProtocol", "dataBiases", "dataCollection", "dataCollectionMissingData", "dataCollectionRawData",
    "dataCollectionTimeframe", "dataCollectionType", "dataImputationProtocol", "dataLimitations",
    "dataManipulationProtocol", "dataPreprocessingProtocol", "dataReleaseMaintenancePlan", "dataSocialImpact",
    "dataUseCases", "machineAnnotationTools", "personalSensitiveInformation",
}  # fmt: skip


@pytest.fixture(scope="module")
def told(released: Path) -> dict[str, Any]:
    return dict(json.loads((released / "croissant.json").read_text()))


@pytest.fixture
def loaded(released: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As the reference library reads it, without a network."""

    def offline(*_: object) -> None:
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", offline)
    return mlcroissant.Dataset(jsonld=released / "croissant.json")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def scans(released: Path) -> set[str]:
    return {path.relative_to(released).as_posix() for path in released.rglob("*.nii.gz")}


def facts_of(evidence: ReleaseEvidence) -> dict[str, Any]:
    decision = decide(evidence, default_policies(evidence.study))
    predicate = Predicate(
        decision=decision.facts, decision_id=decision.id, evidence_head="0" * 64, code_version="0.1.0", issued=NOW
    )
    card = card_facts(study=evidence.study, predicate=predicate, volumes=0, utility=None)
    names = ("generator.safetensors", "dseg.tsv", "decision.json", "report.html", "evidence.jsonl")
    return croissant_facts(card=card, predicate=predicate, digests=dict.fromkeys(names, "a" * 64))


def test_the_reference_library_finds_no_error_and_no_warning(loaded: Any):
    assert loaded.metadata.ctx.is_v1_1()
    assert (loaded.metadata.ctx.issues.errors, loaded.metadata.ctx.issues.warnings) == (set(), set())


def test_what_croissant_requires_is_there(told: dict[str, Any]):
    assert told.keys() >= REQUIRED
    assert "http://mlcommons.org/croissant/1.1" in told["conformsTo"]
    assert None not in told.values()


def test_every_responsible_use_property_is_one_that_exists(told: dict[str, Any]):
    used = {name.removeprefix("rai:") for name in told if name.startswith("rai:")}
    assert used <= RESPONSIBLE
    assert used >= {"personalSensitiveInformation", "dataLimitations", "dataReleaseMaintenancePlan", "dataCollection"}


def test_each_pair_is_one_record_with_the_digests_of_its_files(loaded: Any, released: Path):
    records = [{name.partition("/")[2]: value for name, value in row.items()} for row in loaded.records("subjects")]
    assert [row["subject"] for row in records] == ["sub-synth00001", "sub-synth00002"]
    assert {row[kind] for row in records for kind in ("image", "label")} == scans(released)
    for row in records:
        assert row["image_sha256"] == sha256(released / row["image"])
        assert row["label_sha256"] == sha256(released / row["label"])
        assert row["label"].endswith("_dseg.nii.gz")
        assert row["image"].startswith(f"{row['subject']}/")


def test_the_two_file_sets_share_the_volumes_out(told: dict[str, Any], released: Path):
    patterns = {entry["@id"]: entry["includes"] for entry in told["distribution"] if entry["@type"] == "cr:FileSet"}
    found = {name: set(fnmatch.filter(scans(released), pattern)) for name, pattern in patterns.items()}
    assert found["images"] | found["labels"] == scans(released)
    assert not found["images"] & found["labels"]
    assert all(name.endswith("_angio.nii.gz") for name in found["images"])


def test_files_carry_their_digests(told: dict[str, Any], released: Path):
    files = [entry for entry in told["distribution"] if entry["@type"] == "cr:FileObject"]
    assert {entry["contentUrl"]: entry["sha256"] for entry in files} == {
        name: sha256(released / name) for name in ("generator.safetensors", "dseg.tsv")
    }


def test_label_names_are_those_of_the_study(loaded: Any):
    rows = {row["label_names/index"]: row["label_names/name"] for row in loaded.records("label_names")}
    assert rows == {0: b"background", 1: b"vessel"}


def test_the_evidence_of_the_audit_is_linked_with_digest_and_decision(told: dict[str, Any], released: Path):
    linked = {entry["contentUrl"]: entry for entry in told["subjectOf"]}
    signed = json.loads((released / "decision.json").read_text())["decision_id"]
    assert linked.keys() == {"decision.json", "report.html", "evidence.jsonl", "attestation.dsse.json"}
    assert {entry["identifier"] for entry in linked.values()} == {signed} == {told["identifier"]}
    for name in ("decision.json", "report.html", "evidence.jsonl"):
        assert linked[name]["sha256"] == sha256(released / name)


def test_the_epsilon_of_each_site_and_what_it_does_not_cover_are_told(told: dict[str, Any], evidence: ReleaseEvidence):
    private = "\n".join(told["rai:personalSensitiveInformation"])
    for site, statement in evidence.statements.items():
        assert f"{site}, patients trained on: epsilon {statement.members.epsilon.upper:.3f}" in private
        assert f"{site}, patients held out: epsilon {statement.nonmembers.epsilon.upper:.3f}" in private
    assert "Not covered: A patient treated at two of the sites" in private


def test_a_simulation_says_so_first_and_names_no_real_creator(told: dict[str, Any], evidence: ReleaseEvidence):
    real = {site: replace(s, simulated=False) for site, s in evidence.statements.items()}
    served = facts_of(replace(evidence, simulated=False, statements=real))
    assert told["description"].startswith("SIMULATED")
    assert [maker["name"] for maker in told["creator"]] == ["site-1 (simulated)", "site-2 (simulated)"]
    assert served["description"].startswith("SYNTHETIC")
    assert [maker["name"] for maker in served["creator"]] == ["site-1", "site-2"]


def test_coarser_thresholds_come_before_everything_else(evidence: ReleaseEvidence, study: Study):
    coarse = study.model_copy(update={"release": study.release.model_copy(update={"max_tpr": 0.2})})
    assert facts_of(replace(evidence, study=coarse))["description"].startswith("COARSER THAN THE DEFAULT THRESHOLDS")


@pytest.mark.parametrize(
    ("licence", "told"), [("CC0-1.0", "https://spdx.org/licenses/CC0-1.0.html"), ("our own terms", "our own terms")]
)
def test_only_a_licence_that_has_a_page_gets_an_address(
    evidence: ReleaseEvidence, study: Study, licence: str, told: str
):
    changed = study.model_copy(update={"release": study.release.model_copy(update={"licence": licence})})
    assert facts_of(replace(evidence, study=changed))["license"] == told


def test_expiry_is_the_signed_one(told: dict[str, Any], released: Path):
    assert told["expires"][:10] == json.loads((released / "decision.json").read_text())["expires"][:10] == "2027-11-20"


def test_a_refusal_describes_no_data_set(refused: Path):
    assert not (refused / "croissant.json").exists()
