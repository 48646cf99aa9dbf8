"""What somebody without any trust can check of an audit, and each way in which one does not hold."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from loopback_sites import LoopbackSites
from scripted_hospitals import NOW, hold, scripted

from common.cli import COMMANDS, run
from common.errors import ExitCode, UsageError, VerificationFailed
from common.evidence.canonical import canonical_json, sha256_hex
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import PLAN_RECORD, ROUND_RECORD, read_statement, statement_payload
from common.evidence.signing import Purpose, load_signing_key, parse_envelope, seal, seal_json
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


def sign_anew(bundle: Path, key: Ed25519PrivateKey) -> None:
    """What the auditor could do after changing the evidence in a bundle: sign so that everything agrees again."""
    attestation = bundle / "attestation.dsse.json"
    envelope = parse_envelope(attestation.read_bytes(), attestation.name, Purpose.RELEASE)
    predicate = read_statement(envelope.payload, attestation.name).predicate
    predicate = predicate.model_copy(update={"evidence_head": EvidenceChain(bundle / "evidence.jsonl").head})
    (bundle / "decision.json").write_text(json.dumps(predicate.json_value()))
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    digests = {name: sha256_hex(p.read_bytes()) for name, p in files.items() if p != attestation}
    del digests["manifest.json"]
    (bundle / "manifest.json").write_text(json.dumps({"sha256": digests}))
    digests["manifest.json"] = sha256_hex((bundle / "manifest.json").read_bytes())
    attestation.write_bytes(seal(statement_payload(digests, predicate), key, Purpose.RELEASE))


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
    result.write_text(result.read_text().replace('"members":', '"members": ', 1))
    fails(copied, r"result\.json: the stored answers, judged again, do not give this result")


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


def test_a_plan_put_on_record_after_the_first_round_is_refused_even_when_signed(audited: Path, tmp_path: Path):
    """The auditor moves the record and signs everything anew."""
    bundle = Path(shutil.copytree(audited / "release", tmp_path / "bundle"))
    records = EvidenceChain(bundle / "evidence.jsonl").verify()
    early = next(record for record in records if record.kind == PLAN_RECORD)
    first = next(record.index for record in records if record.kind == ROUND_RECORD)
    moved = [*(r for r in records[: first + 1] if r is not early), early, *records[first + 1 :]]
    (bundle / "evidence.jsonl").unlink()
    for record in moved:
        EvidenceChain(bundle / "evidence.jsonl").append(record.kind, record.body, NOW)
    sign_anew(bundle, load_signing_key(RunFolder(path=audited).auditor_key))
    fails(bundle, r"plan\.dsse\.json: was put on record after the sites had begun to answer")


@pytest.mark.parametrize("part", ["", "checkpoint", "nowhere"])
def test_what_is_no_audit_is_wrong_usage(tmp_path: Path, audited: Path, part: str):
    with pytest.raises(UsageError, match="nothing was verified"):
        verify_audit((audited / part if part else tmp_path), trusted_key=None, now=datetime.now(UTC))
