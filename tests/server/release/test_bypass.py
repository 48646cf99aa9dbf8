"""Who overrules the gate cannot do it quietly, nor without the hospitals' agreement, nor for a release."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signed_evidence import with_receipt

from common.cli import run as run_command
from common.errors import ExitCode, IntegrityError, Refusal, UsageError, VerificationFailed
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import Outcome
from common.evidence.signing import Purpose, create_signing_key, parse_envelope, public_pem
from common.evidence.verification import verify_bundle
from common.settings.load import study_digest, study_json
from common.settings.study import Study
from server.release.bypass import bypass_gate
from server.release.evidence import ReleaseEvidence
from server.release.policies import coarser_than_default
from server.run_folder import Engine, RunFacts, RunFolder

NOW = datetime.now(UTC).replace(microsecond=0)
REASON = "the board wants <b>volumes</b> today"


def about(evidence: ReleaseEvidence, study: Study) -> ReleaseEvidence:
    """The same evidence for another study, with receipts signed anew."""
    statements = {
        site: with_receipt(site, replace(s, study_digest=study_digest(study)), study, evidence.generator_digest)
        for site, s in evidence.statements.items()
    }
    return replace(evidence, study=study, statements=statements)


@pytest.fixture
def finished(tmp_path: Path, publish: Callable[..., Path]) -> Callable[..., RunFolder]:
    """A finished run whose gate decided about `evidence`."""

    def make(evidence: ReleaseEvidence) -> RunFolder:
        facts = RunFacts(
            engine=Engine.LOCAL, sites=evidence.sites, seed=0, simulated=True, study_digest=evidence.study_digest
        )
        run = RunFolder.create_or_resume(tmp_path / "run", evidence.study, facts)
        publish(run.path, evidence, NOW)
        shutil.move(run.path / "auditor.key", run.auditor_key)
        run.finish("decided")
        return run

    return make


@pytest.fixture
def permissive(study: Study) -> Study:
    return study.model_copy(update={"release": study.release.model_copy(update={"unsafe_bypass": True})})


@pytest.fixture
def refused_run(finished: Callable[..., RunFolder], evidence: ReleaseEvidence, permissive: Study) -> RunFolder:
    return finished(about(replace(evidence, audit=None), permissive))


def everything(run: RunFolder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(run.path.rglob("*")) if p.is_file() and p.name != ".lock"}


def test_a_bypass_says_unsafe_in_every_place_a_reader_may_look(refused_run: RunFolder, tmp_path: Path):
    out = tmp_path / "volumes-UNSAFE"
    bypass_gate(refused_run, out, reason=REASON, now=NOW)
    assert (out / "UNSAFE.txt").read_text().startswith("UNSAFE. The release gate decided INCONCLUSIVE.")
    assert (out / "README").read_text().startswith("UNSAFE. ")
    assert "UNSAFE" in "\n".join((out / "card.md").read_text().splitlines()[:5])
    assert json.loads((out / "manifest.json").read_text())["unsafe"] == REASON
    assert json.loads((out / "dataset_description.json").read_text())["Name"].startswith("UNSAFE, not a release: ")
    page = (out / "report.html").read_text()
    assert page.index("UNSAFE: not a release") < page.index("<body>") + 80
    assert "&lt;b&gt;volumes" in page
    envelope = parse_envelope((out / "attestation.dsse.json").read_bytes(), "attestation", Purpose.RELEASE)
    signed = json.loads(envelope.payload)["predicate"]
    assert signed["bypass"]["reason"] == REASON
    assert signed["decision"]["outcome"] == "INCONCLUSIVE"
    assert signed["expires"] is None


def test_a_bypass_hands_out_volumes_but_never_the_generator(refused_run: RunFolder, tmp_path: Path):
    out = tmp_path / "volumes-UNSAFE"
    bypass_gate(refused_run, out, reason=REASON, now=NOW)
    names = {path.name for path in out.rglob("*")}
    assert sum(name.endswith(".nii.gz") for name in names) == 4
    assert not any(name.endswith(".safetensors") for name in names)


def test_a_bypassed_folder_is_authentic_and_no_release(
    refused_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "volumes-UNSAFE"
    bypass_gate(refused_run, out, reason=REASON, now=NOW)
    verified = verify_bundle(out, trusted_key=None, now=NOW)
    assert verified.outcome is Outcome.INCONCLUSIVE
    assert run_command(["verify", str(out)]) == ExitCode.REFUSED
    shown = capsys.readouterr().out
    assert shown.startswith("UNSAFE: NOT A RELEASE. The gate decided INCONCLUSIVE; somebody overruled it.")
    assert REASON in shown
    assert run_command(["sample", str(out), "--n", "1", "--out", str(tmp_path / "more")]) == ExitCode.REFUSED


def test_a_bypass_is_recorded_and_changes_nothing_else_in_the_run(refused_run: RunFolder, tmp_path: Path):
    before = everything(refused_run)
    bypass_gate(refused_run, tmp_path / "volumes-UNSAFE", reason=REASON, now=NOW)
    after = everything(refused_run)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {str(refused_run.evidence)}
    last = EvidenceChain(refused_run.evidence).verify()[-1]
    assert (last.kind, last.body["reason"]) == ("unsafe-bypass", REASON)
    assert last.body["refusal"] == verify_bundle(refused_run.release, trusted_key=None, now=NOW).digest


def test_a_study_that_does_not_allow_it_forbids_it(
    finished: Callable[..., RunFolder], evidence: ReleaseEvidence, tmp_path: Path
):
    run = finished(replace(evidence, audit=None))
    before = everything(run)
    with pytest.raises(Refusal, match="the study forbids to overrule it"):
        bypass_gate(run, tmp_path / "volumes-UNSAFE", reason=REASON, now=NOW)
    assert everything(run) == before
    assert not (tmp_path / "volumes-UNSAFE").exists()


def test_a_study_that_was_made_permissive_afterwards_allows_nothing(
    finished: Callable[..., RunFolder], evidence: ReleaseEvidence, permissive: Study, tmp_path: Path
):
    run = finished(replace(evidence, audit=None))
    run.study_file.write_text(study_json(permissive))
    run.facts_file.write_text(replace(run.facts, study_digest=study_digest(permissive)).to_json())
    before = everything(run)
    with pytest.raises(IntegrityError, match=r"study\.json is not the study that was decided on"):
        bypass_gate(run, tmp_path / "volumes-UNSAFE", reason=REASON, now=NOW)
    assert everything(run) == before
    assert not (tmp_path / "volumes-UNSAFE").exists()


def test_a_refusal_that_the_runs_own_key_did_not_sign_is_not_bypassed(refused_run: RunFolder, tmp_path: Path):
    refused_run.auditor_key.unlink()
    create_signing_key(refused_run.auditor_key)
    with pytest.raises(VerificationFailed, match="signed by somebody else"):
        bypass_gate(refused_run, tmp_path / "volumes-UNSAFE", reason=REASON, now=NOW)
    assert not (tmp_path / "volumes-UNSAFE").exists()


def test_a_run_that_was_released_has_nothing_to_bypass(
    finished: Callable[..., RunFolder], evidence: ReleaseEvidence, permissive: Study, tmp_path: Path
):
    run = finished(about(evidence, permissive))
    with pytest.raises(UsageError, match="the gate released this run"):
        bypass_gate(run, tmp_path / "volumes-UNSAFE", reason=REASON, now=NOW)


@pytest.mark.parametrize(
    ("name", "reason", "words"),
    [
        ("volumes", REASON, "Choose a name with UNSAFE in it, such as volumes-UNSAFE"),
        ("volumes-UNSAFE", "", "10 to 500 printable"),
        ("volumes-UNSAFE", "a line\nand another", "10 to 500 printable"),
        ("UNSAFE-taken", REASON, "is there already"),
    ],
)
def test_a_bypass_without_a_name_or_a_reason_is_not_recorded(
    refused_run: RunFolder, tmp_path: Path, name: str, reason: str, words: str
):
    (tmp_path / "UNSAFE-taken").mkdir()
    before = everything(refused_run)
    with pytest.raises(UsageError, match=words):
        bypass_gate(refused_run, tmp_path / name, reason=reason, now=NOW)
    assert everything(refused_run) == before


def test_candidates_that_were_swapped_are_not_handed_out(refused_run: RunFolder, tmp_path: Path):
    volume = next(refused_run.candidates.rglob("*.nii.gz"))
    volume.write_bytes(volume.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match="changed after they were audited"):
        bypass_gate(refused_run, tmp_path / "volumes-UNSAFE", reason=REASON, now=NOW)
    assert not (tmp_path / "volumes-UNSAFE").exists()


def test_the_command_exits_1_even_when_it_did_what_it_was_told(
    refused_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["release", str(refused_run.path), "--unsafe-bypass", REASON]
    assert run_command([*arguments, "--out", str(tmp_path / "x-UNSAFE")]) == ExitCode.REFUSED
    assert capsys.readouterr().out.startswith("UNSAFE: the gate decided INCONCLUSIVE")
    assert (tmp_path / "x-UNSAFE" / "UNSAFE.txt").exists()


def test_a_study_that_allows_a_bypass_says_so_before_everything_else(permissive: Study, study: Study):
    assert coarser_than_default(study) == ()
    (said,) = coarser_than_default(permissive)
    assert said.startswith("release.unsafe_bypass is set")


def test_the_mark_cannot_be_taken_off(refused_run: RunFolder, tmp_path: Path):
    out = tmp_path / "volumes-UNSAFE"
    bypass_gate(refused_run, out, reason=REASON, now=NOW)
    for name in ("UNSAFE.txt", "README", "manifest.json", "card.md"):
        copy = Path(shutil.copytree(out, tmp_path / f"without {name}"))
        (copy / name).write_text((copy / name).read_text().replace("UNSAFE", "fine"))
        (copy / name).write_text((copy / name).read_text().replace("unsafe", "fine"))
        with pytest.raises(VerificationFailed, match=name):
            verify_bundle(copy, trusted_key=None, now=NOW)


def test_a_bypass_signed_by_somebody_else_is_not_the_auditors(refused_run: RunFolder, tmp_path: Path):
    out = tmp_path / "volumes-UNSAFE"
    bypass_gate(refused_run, out, reason=REASON, now=NOW)
    other: Any = public_pem(Ed25519PrivateKey.generate().public_key())
    with pytest.raises(VerificationFailed, match="somebody else"):
        verify_bundle(out, trusted_key=other, now=NOW)
