"""What somebody without any trust can check of an audit, and each way in which one does not hold."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from loopback_sites import LoopbackSites
from scripted_hospitals import NOW, hold, scripted

from common.cli import COMMANDS, run
from common.errors import ExitCode, UsageError, VerificationFailed
from common.evidence.canonical import canonical_json, sha256_hex
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import ENROLMENT_RECORD, PLAN_RECORD, QUESTION_RECORD, Predicate, statement_payload
from common.evidence.signing import Purpose, load_signing_key, parse_envelope, seal, seal_json
from common.measure.audit_plan import AuditPlan
from server.audit.result import AuditResult
from server.audit_stage import AuditFolder, rejudge
from server.audit_verification import verify_audit
from server.run_folder import RunFolder

AUDIT_VERIFY = [EntryPoint("audit verify", "server.audit_cli:verify", COMMANDS)]


SEALED_PLAN = "plan.dsse.json"


@pytest.fixture
def audited(released) -> Path:  # type: ignore[no-untyped-def]
    """A finished run; read it or copy it, never change it."""
    return Path(released[1].path)


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited, tmp_path / "run"))


def fails(path: Path, words: str) -> None:
    with pytest.raises(VerificationFailed, match=words):
        verify_audit(path, trusted_key=None, now=NOW)


def rewrite(chain: Path, change: Callable[[str, dict[str, object]], dict[str, object] | None]) -> None:
    """The whole chain anew, as somebody without the auditor's key could: bodies changed, or records left out."""
    records = EvidenceChain(chain).verify()
    chain.unlink()
    for record in records:
        body = change(record.kind, dict(record.body))
        if body is not None:
            EvidenceChain(chain).append(record.kind, body, datetime.fromisoformat(record.time))


def sign_anew(bundle: Path, key: Ed25519PrivateKey, change: Callable[[dict[str, Any]], object] = id) -> None:
    """What the auditor could do after changing files in a bundle: sign so that everything agrees again.

    change: of the decision.
    """
    attestation = bundle / "attestation.dsse.json"
    envelope = parse_envelope(attestation.read_bytes(), attestation.name, Purpose.RELEASE)
    predicate = json.loads(envelope.payload)["predicate"]
    old = predicate["decision_id"]
    change(predicate["decision"])
    new = sha256_hex(canonical_json(predicate["decision"]))
    rewrite(bundle / "evidence.jsonl", lambda _, body: {**body, "decision_id": new} if "decision_id" in body else body)
    for name in ("card.json", "card.md", "report.html", "report.json"):
        (bundle / name).write_text((bundle / name).read_text().replace(old, new))
    card = json.loads((bundle / "card.json").read_text())
    card |= {name: predicate["decision"][name] for name in ("outcome", "sites")}
    (bundle / "card.json").write_text(json.dumps(card))
    predicate |= {"decision_id": new, "evidence_head": EvidenceChain(bundle / "evidence.jsonl").head}
    (bundle / "decision.json").write_text(json.dumps(predicate))
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    digests = {name: sha256_hex(p.read_bytes()) for name, p in files.items() if p != attestation}
    del digests["manifest.json"]
    (bundle / "manifest.json").write_text(json.dumps({"sha256": digests}))
    digests["manifest.json"] = sha256_hex((bundle / "manifest.json").read_bytes())
    signed = Predicate.model_validate_json(json.dumps(predicate))
    attestation.write_bytes(seal(statement_payload(digests, signed), key, Purpose.RELEASE))


@pytest.fixture
def auditor(audited: Path) -> Ed25519PrivateKey:
    return load_signing_key(RunFolder(path=audited).auditor_key)


@pytest.fixture
def bundle(audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited / "release", tmp_path / "bundle"))


@pytest.mark.parametrize("part", ["", "audit", "release"])
def test_a_run_its_audit_folder_and_its_release_verify(audited: Path, part: str):
    verified = verify_audit(audited / part, trusted_key=None, now=NOW)
    assert verified.result.verdict.value == "pass"
    assert "receipts of 3 sites name the answers that were used" in " ".join(verified.findings)


def test_the_command_exits_0_for_an_audit_that_holds_and_passed(audited: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["audit", "verify", str(audited), "--json"], AUDIT_VERIFY) == ExitCode.DONE
    facts = json.loads(capsys.readouterr().out)
    assert (facts["verified"], facts["verdict"], facts["outcome"]) == (True, "pass", "RELEASE")


def test_a_report_without_its_data_is_refused_and_says_what_is_missing(copied: Path):
    for name in ("answers.json", "result.json", "plan.json"):
        kept = (copied / "audit" / name).read_bytes()
        (copied / "audit" / name).unlink()
        fails(copied, rf"report\.html is a report without its data: {name} is missing")
        (copied / "audit" / name).write_bytes(kept)


def test_a_plan_that_nobody_signed_is_refused(copied: Path):
    (copied / "audit" / SEALED_PLAN).unlink()
    fails(copied, r"plan\.dsse\.json is missing")


def test_a_plan_signed_by_somebody_else_or_later_is_not_the_one_on_record(copied: Path):
    sealed = copied / "audit" / SEALED_PLAN
    plan = json.loads((copied / "audit" / "plan.json").read_text())
    sealed.write_bytes(seal_json(plan, Ed25519PrivateKey.generate(), Purpose.AUDIT_PLAN))
    fails(copied, r"plan\.dsse\.json: the evidence chain does not record this plan and its signature")


def test_another_plan_under_the_old_signature_is_refused(copied: Path):
    plan = json.loads((copied / "audit" / "plan.json").read_text())
    plan["confidence"] = 0.9
    (copied / "audit" / "plan.json").write_bytes(canonical_json(plan))
    fails(copied, r"plan\.dsse\.json: the evidence chain does not record this plan")


def test_changed_answers_are_not_those_on_record(copied: Path):
    answers = copied / "audit" / "answers.json"
    body = json.loads(answers.read_text())
    body["replies"]["a"]["histograms"][0]["counts"][0] += 1
    answers.write_bytes(canonical_json(body))
    fails(copied, r"answers\.json: is not what the evidence chain recorded")


def test_a_changed_result_is_found_by_judging_again(copied: Path):
    result = copied / "audit" / "result.json"
    body = json.loads(result.read_text())
    body["endpoints"][0]["auc_upper"]["value"] -= 1e-4
    result.write_bytes(canonical_json(body))
    fails(copied, r"result\.json: the stored answers, judged again, do not give this result")


def test_a_result_that_says_the_same_in_other_bytes_is_not_the_one_on_record(copied: Path):
    result = copied / "audit" / "result.json"
    result.write_text(result.read_text().replace('"members":', '"members": ', 1))
    fails(copied, r"result\.json: is not the result that the evidence chain recorded")


def inconclusive(copied: Path) -> Path:
    """The result of the same answers for a study that tolerates nothing, as its run would have stored it."""
    result = copied / "audit" / "result.json"
    result.write_text(judged_again(copied, max_auc=0.5)[0].to_json())
    return result


def judged_again(run: Path, **limits: float) -> tuple[AuditResult, bool]:
    study = RunFolder(path=run).study
    release = study.release.model_copy(update=limits)
    return rejudge(study.model_copy(update={"release": release}), AuditFolder(path=run / "audit"))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_bytes(canonical_json(body))


def reworded(body: dict[str, Any]) -> None:
    body["reasons"] = ["a reason in the words of an earlier version"]
    body["inference"]["question"] = "asked otherwise"
    for endpoint in body["endpoints"]:
        endpoint["epsilon_lower"] |= {"method": "named otherwise", "assumption": "stated otherwise"}


def rounded(body: dict[str, Any]) -> None:
    for endpoint in body["endpoints"]:
        endpoint["auc"]["estimate"] *= 1 + 1e-13


def forgetful(body: dict[str, Any]) -> None:
    """As of a version that did not know a field, which is null here."""
    assert body.pop("blind") is None


@pytest.mark.parametrize("change", [reworded, rounded, forgetful])
def test_a_result_that_differs_in_words_or_rounding_only_is_the_one_on_record(
    copied: Path, change: Callable[[dict[str, Any]], object]
):
    change_json(inconclusive(copied), change)
    result, as_recorded = judged_again(copied, max_auc=0.5)
    assert (as_recorded, result.verdict.value) == (True, "inconclusive")


def test_the_result_that_agrees_is_the_recorded_one_under_its_own_digest(copied: Path):
    recorded = inconclusive(copied)
    change_json(recorded, reworded)
    assert judged_again(copied, max_auc=0.5)[0].digest == sha256_hex(recorded.read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(verdict="fail"),
        lambda body: body.update(reasons=[]),
        lambda body: body.update(sites=["a", "b", "d"]),
        lambda body: body.update(plan_digest="0" * 64),
        lambda body: body.update(extra=1),
        lambda body: body["endpoints"].pop(),
        lambda body: body["endpoints"][0].update(name="another"),
        lambda body: body["endpoints"][0]["auc"].update(estimate=body["endpoints"][0]["auc"]["estimate"] + 1e-5),
        lambda body: body["endpoints"][0]["planted"].update(detected=not body["endpoints"][0]["planted"]["detected"]),
        lambda body: body["endpoints"][0]["planted"].update(detected=1),
        lambda body: body["thresholds"].update(max_auc=None),
    ],
)
def test_a_result_that_differs_in_anything_else_is_not(copied: Path, change: Callable[[dict[str, Any]], object]):
    change_json(inconclusive(copied), change)
    assert judged_again(copied, max_auc=0.5)[1] is False


@pytest.mark.parametrize("text", ["", "not JSON", "null", "[]"])
def test_a_damaged_result_is_not_the_one_that_is_reached_again(copied: Path, text: str):
    (copied / "audit" / "result.json").write_text(text)
    result, as_recorded = judged_again(copied)
    assert (as_recorded, result.verdict.value) == (False, "pass")


def test_a_report_of_another_decision_is_refused(copied: Path):
    (copied / "report.html").write_text("<html>all is well</html>")
    fails(copied, r"report\.html: does not carry the decision")


def test_an_edited_chain_of_a_run_no_longer_begins_with_what_was_signed(copied: Path):
    rewrite(copied / "evidence.jsonl", lambda kind, body: {**body, "edited": True} if kind == "warm-start" else body)
    fails(copied, r"evidence\.jsonl: does not begin with the records that were signed")


def test_one_flipped_byte_in_any_file_of_a_bundles_audit_is_found_and_the_file_named(audited: Path, tmp_path: Path):
    bundle = Path(shutil.copytree(audited / "release", tmp_path / "bundle"))
    files = sorted(path for path in (bundle / "audit").iterdir())
    assert {"plan.json", SEALED_PLAN, "answers.json", "result.json"} <= {path.name for path in files}
    for path in files:
        good = path.read_bytes()
        path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        fails(bundle, f"audit/{path.name}: was changed after it was signed")
        path.write_bytes(good)


def test_answers_swapped_by_the_auditor_are_not_those_that_the_sites_signed(audited: Path, tmp_path: Path):
    """The auditor has the key and signs everything anew; the sites' receipts still tell."""
    honest = scripted()

    def lying(order: object) -> object:
        reply = honest["a"](order)  # type: ignore[arg-type]
        if type(reply).__name__ != "ScoreReply":
            return reply
        counts = reply.histograms[0].counts  # type: ignore[union-attr]
        changed = vars(reply.histograms[0]) | {"counts": (counts[0] + 1, *counts[1:])}  # type: ignore[union-attr]
        first = type(reply.histograms[0])(**changed)  # type: ignore[union-attr]
        return type(reply)(**(vars(reply) | {"histograms": (first, *reply.histograms[1:])}))  # type: ignore[union-attr]

    outcome, _ = hold(tmp_path / "run", LoopbackSites({**honest, "a": lying}))  # type: ignore[dict-item]
    assert outcome.outcome.value == "REJECT"
    assert "a: the receipt names other audit answers than those that were used" in outcome.reasons


@pytest.mark.parametrize("kind", ["warm-up", "round", "canaries", "audit-answers"])
def test_a_plan_put_on_record_after_a_site_answered_is_refused_even_when_signed(
    bundle: Path, auditor: Ed25519PrivateKey, kind: str
):
    """The auditor has the plan on record later and signs everything anew."""
    records = EvidenceChain(bundle / "evidence.jsonl").verify()
    (bundle / "evidence.jsonl").unlink()
    for record in records:
        if record.kind == PLAN_RECORD:
            EvidenceChain(bundle / "evidence.jsonl").append(kind, {}, NOW)
        EvidenceChain(bundle / "evidence.jsonl").append(record.kind, record.body, NOW)
    sign_anew(bundle, auditor)
    fails(bundle, r"plan\.dsse\.json: was put on record after the sites had begun to answer")


def test_a_plan_that_the_study_does_not_prescribe_is_refused_even_when_signed(bundle: Path, auditor: Ed25519PrivateKey):
    change_json(bundle / "audit" / "plan.json", lambda plan: plan.update(confidence=0.9))
    plan = AuditPlan.from_json((bundle / "audit" / "plan.json").read_text())
    sealed = seal_json(json.loads(plan.to_json()), auditor, Purpose.AUDIT_PLAN)
    (bundle / "audit" / SEALED_PLAN).write_bytes(sealed)
    fixed = {"plan_digest": plan.digest, "sealed": sha256_hex(sealed)}
    rewrite(bundle / "evidence.jsonl", lambda kind, body: fixed if kind == PLAN_RECORD else body)
    sign_anew(bundle, auditor)
    fails(bundle, r"plan\.json: is not the plan that the study prescribes for the sites that enrolled")


def test_a_second_enrolment_is_refused_even_when_signed(bundle: Path, auditor: Ed25519PrivateKey):
    records = EvidenceChain(bundle / "evidence.jsonl").verify()
    (bundle / "evidence.jsonl").unlink()
    for record in records:
        for _ in range(2 if record.kind == ENROLMENT_RECORD else 1):
            EvidenceChain(bundle / "evidence.jsonl").append(record.kind, record.body, NOW)
    sign_anew(bundle, auditor)
    fails(bundle, r"evidence\.jsonl: records 2 enrolments")


def test_a_site_that_was_audited_and_left_out_of_a_release_is_named(bundle: Path, auditor: Ed25519PrivateKey):
    (bundle / "receipts" / "c.dsse.json").unlink()
    sign_anew(bundle, auditor, lambda decision: decision["sites"].pop("c"))
    fails(bundle, r"answers\.json: the audit and the decision are not about the same sites: c")


def test_guesses_that_the_chain_did_not_record_are_refused_even_when_signed(bundle: Path, auditor: Ed25519PrivateKey):
    (bundle / "audit" / "canaries.json").write_text("{}")
    sign_anew(bundle, auditor)
    fails(bundle, r"canaries\.json: is not what the evidence chain recorded")


def test_recorded_guesses_that_are_missing_or_changed_are_refused_even_when_signed(
    bundle: Path, auditor: Ed25519PrivateKey
):
    records = EvidenceChain(bundle / "evidence.jsonl").verify()
    (bundle / "evidence.jsonl").unlink()
    for record in records:
        if record.kind == QUESTION_RECORD:
            EvidenceChain(bundle / "evidence.jsonl").append("canaries", {"sha256": sha256_hex(b"{}")}, NOW)
        EvidenceChain(bundle / "evidence.jsonl").append(record.kind, record.body, NOW)
    sign_anew(bundle, auditor)
    fails(bundle, r"canaries\.json: is missing")
    (bundle / "audit" / "canaries.json").write_text("{ }")
    sign_anew(bundle, auditor)
    fails(bundle, r"canaries\.json: is not what the evidence chain recorded")


def test_a_bundle_without_its_study_cannot_be_judged(bundle: Path, auditor: Ed25519PrivateKey):
    (bundle / "study.json").unlink()
    sign_anew(bundle, auditor)
    fails(bundle, r"study\.json: is missing")


def test_a_study_that_this_version_reads_otherwise_is_told_from_a_changed_one(bundle: Path, auditor: Ed25519PrivateKey):
    """The study of an earlier version that did not state a setting yet; a refusal, so that no receipt names another."""
    for path in [*bundle.rglob("*.nii.gz"), *bundle.glob("receipts/*"), bundle / "generator.safetensors"]:
        path.unlink()
    change_json(bundle / "study.json", lambda study: study["release"].pop("unsafe_bypass"))
    digest = sha256_hex((bundle / "study.json").read_bytes())
    sign_anew(bundle, auditor, lambda d: d.update(study_digest=digest, sites={}, outcome="REJECT"))
    fails(bundle, r"study\.json: this version of Consilium does not read it as the study")


def test_a_bundle_that_is_signed_anew_without_a_change_still_verifies(bundle: Path, auditor: Ed25519PrivateKey):
    sign_anew(bundle, auditor)
    assert verify_audit(bundle, trusted_key=None, now=NOW).decision.outcome.value == "RELEASE"


def test_of_a_run_the_signed_report_is_checked_and_its_own_copy_said_to_be_unsigned(audited: Path):
    said = "the signed report, release/report.html, carries the decision; the run's own copy is not signed"
    assert said in verify_audit(audited, trusted_key=None, now=NOW).findings
    assert (
        "the signed report carries the decision"
        in verify_audit(audited / "release", trusted_key=None, now=NOW).findings
    )


@pytest.mark.parametrize("part", ["", "checkpoint", "nowhere"])
def test_what_is_no_audit_is_wrong_usage(tmp_path: Path, audited: Path, part: str):
    with pytest.raises(UsageError, match="nothing was verified"):
        verify_audit((audited / part if part else tmp_path), trusted_key=None, now=datetime.now(UTC))
