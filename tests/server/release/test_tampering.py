"""What an attacker may try on a bundle, and what verification answers. Every answer names the file."""

import json
import os
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from signed_evidence import SITE_KEYS

from common.errors import UsageError, VerificationFailed
from common.evidence.canonical import canonical_json, sha256_hex
from common.evidence.chain import EvidenceChain, read_chain
from common.evidence.countersignature import add_countersignature
from common.evidence.predicate import Outcome
from common.evidence.receipt import read_receipt, sign_receipt
from common.evidence.revocation import revoke
from common.evidence.signing import (
    Purpose,
    fingerprint,
    load_signing_key,
    parse_envelope,
    public_key_hex,
    public_pem,
    seal,
)
from common.evidence.verification import verify_bundle

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(days=1)
ATTESTATION = "attestation.dsse.json"


@pytest.fixture
def bundle(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "bundle"))


@pytest.fixture
def refusal(refused: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(refused, tmp_path / "refusal"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fails(folder: Path, words: str, **arguments: Any) -> None:
    with pytest.raises(VerificationFailed, match=words):
        verify_bundle(folder, **{"trusted_key": None, "now": LATER, **arguments})


def sign_again(folder: Path, change: Callable[[dict[str, Any]], None], key: Ed25519PrivateKey | None = None) -> None:
    """What the auditor, or a thief of the key, could do: change files or statement and sign everything anew."""
    key = key or Ed25519PrivateKey.generate()
    statement = json.loads(parse_envelope((folder / ATTESTATION).read_bytes(), ATTESTATION, Purpose.RELEASE).payload)
    (folder / "auditor.pub.pem").write_bytes(public_pem(key.public_key()))
    digests = {
        path.relative_to(folder).as_posix(): sha256_hex(path.read_bytes())
        for path in files_of(folder)
        if path.name not in {ATTESTATION, "manifest.json"}
    }
    (folder / "manifest.json").write_text(json.dumps({"schema_version": 1, "sha256": digests}))
    digests["manifest.json"] = sha256_hex((folder / "manifest.json").read_bytes())
    statement["subject"] = [{"name": name, "digest": {"sha256": digests[name]}} for name in sorted(digests)]
    change(statement)
    (folder / ATTESTATION).write_bytes(seal(canonical_json(statement), key, Purpose.RELEASE))


def nothing(statement: dict[str, Any]) -> None:
    """Sign again without a change."""


def test_a_release_verifies(released: Path):
    verified = verify_bundle(released, trusted_key=None, now=LATER)
    assert verified.outcome is Outcome.RELEASE
    assert verified.files == len(files_of(released))
    assert not verified.pinned


def test_a_refusal_verifies_as_a_refusal(refused: Path):
    assert verify_bundle(refused, trusted_key=None, now=LATER).outcome is Outcome.INCONCLUSIVE


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["released", "refused"])
def test_one_flipped_bit_anywhere_is_found_and_the_file_named(
    kind: str, data: st.DataObject, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
):
    folder: Path = request.getfixturevalue(kind)
    path = data.draw(st.sampled_from(files_of(folder)))
    good = path.read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bytes(bad))
        fails(folder, re.escape(path.relative_to(folder).as_posix()))
    finally:
        path.write_bytes(good)


def test_every_bit_of_the_public_key_counts(bundle: Path):
    path = bundle / "auditor.pub.pem"
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bytes(bad))
        fails(bundle, r"auditor\.pub\.pem")


def test_every_missing_file_is_named(released: Path, tmp_path: Path):
    for number, path in enumerate(files_of(released)):
        name = path.relative_to(released)
        copy = Path(shutil.copytree(released, tmp_path / str(number)))
        (copy / name).unlink()
        fails(copy, re.escape(f"{name.as_posix()}: is missing"))


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "sub-synth00001/anat/.DS_Store", "new/deep/file", "ähm"])
def test_an_extra_file_is_named(bundle: Path, name: str):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"x")
    fails(bundle, re.escape(f"{name}: is not part of what was signed"))


def test_two_problems_are_both_named(bundle: Path):
    (bundle / "card.md").unlink()
    (bundle / "README").write_text("changed")
    fails(bundle, r"(?s)card\.md: is missing.*README: was changed")


def test_swapped_volumes_are_found(bundle: Path):
    a, b = sorted(bundle.glob("sub-*/anat/*angio.nii.gz"))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    fails(bundle, re.escape(a.name))


def test_a_link_is_refused_even_when_it_leads_to_the_right_bytes(bundle: Path, tmp_path: Path):
    outside = tmp_path / "card.md"
    shutil.move(bundle / "card.md", outside)
    (bundle / "card.md").symlink_to(outside)
    fails(bundle, r"card\.md: is a link")


def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path):
    shutil.move(bundle / "sub-synth00001", tmp_path / "elsewhere")
    (bundle / "sub-synth00001").symlink_to(tmp_path / "elsewhere")
    fails(bundle, "sub-synth00001: is a link")


def test_a_pipe_is_refused_instead_of_waited_for(bundle: Path):
    os.mkfifo(bundle / "pipe")
    fails(bundle, "pipe: is a special file")


def test_a_file_name_cannot_steer_the_terminal(bundle: Path):
    (bundle / "\x1b[2Jx").write_bytes(b"x")
    fails(bundle, re.escape(r"'\x1b[2Jx': is not part"))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../b", "./a", "a//b", "a\\b", "", "a\0b"])
def test_a_subject_outside_of_the_bundle_is_refused(bundle: Path, name: str):
    def add(statement: dict[str, Any]) -> None:
        statement["subject"] = sorted(
            [*statement["subject"], {"name": name, "digest": {"sha256": "0" * 64}}], key=lambda s: str(s["name"])
        )

    sign_again(bundle, add)
    fails(bundle, r"attestation\.dsse\.json: .*(outside|subject)")


def test_a_subject_named_twice_is_refused(bundle: Path):
    sign_again(bundle, lambda statement: statement["subject"].insert(0, statement["subject"][0]))
    fails(bundle, r"attestation\.dsse\.json: its subjects are repeated")


def test_everything_signed_anew_by_somebody_else_passes_only_without_the_auditors_key(released: Path, bundle: Path):
    trusted = (released / "auditor.pub.pem").read_bytes()
    assert verify_bundle(bundle, trusted_key=trusted, now=LATER).pinned
    thief = Ed25519PrivateKey.generate()
    sign_again(bundle, nothing, thief)
    assert verify_bundle(bundle, trusted_key=None, now=LATER).key_fingerprint == fingerprint(thief.public_key())
    fails(bundle, r"auditor\.pub\.pem: .*signed by somebody else", trusted_key=trusted)


def test_a_replaced_key_without_a_new_signature_is_found(bundle: Path):
    (bundle / "auditor.pub.pem").write_bytes(public_pem(Ed25519PrivateKey.generate().public_key()))
    fails(bundle, r"auditor\.pub\.pem: the signature does not hold")


def test_a_trusted_key_that_is_no_key_is_refused(released: Path):
    fails(released, "the trusted key: holds no readable", trusted_key=b"nonsense")


def test_a_signed_statement_of_another_kind_is_refused(bundle: Path):
    sign_again(bundle, lambda statement: statement.update(predicateType="https://slsa.dev/provenance/v1"))
    fails(bundle, "not a release statement")


def test_an_unknown_field_in_the_signed_decision_is_refused(bundle: Path):
    sign_again(bundle, lambda statement: statement["predicate"]["decision"].update(note="trust me"))
    fails(bundle, "not a release statement")


def test_a_rejection_turned_into_a_release_contradicts_its_own_id(refusal: Path):
    sign_again(refusal, lambda statement: statement["predicate"]["decision"].update(outcome="RELEASE", reasons=[]))
    fails(refusal, r"attestation\.dsse\.json: its decision does not have the id")


def test_a_changed_epsilon_in_the_card_is_found_even_when_signed(bundle: Path):
    card = json.loads((bundle / "card.json").read_text())
    card["sites"]["site-1"]["members"]["epsilon"] = 0.1
    (bundle / "card.json").write_text(json.dumps(card))
    sign_again(bundle, nothing)
    fails(bundle, r"card\.json: its 'sites' differs")


@pytest.mark.parametrize("name", ["report.html", "card.md"])
def test_a_report_or_card_of_another_decision_is_found_even_when_signed(bundle: Path, name: str):
    (bundle / name).write_text("everything is fine")
    sign_again(bundle, nothing)
    fails(bundle, re.escape(f"{name}: does not carry the id"))


def test_another_decision_file_is_found_even_when_signed(bundle: Path):
    decision = json.loads((bundle / "decision.json").read_text())
    decision["decision"]["simulated"] = False
    (bundle / "decision.json").write_text(json.dumps(decision))
    sign_again(bundle, nothing)
    fails(bundle, r"decision\.json: does not say what was signed")


def test_a_shortened_evidence_chain_is_found_even_when_signed(bundle: Path):
    lines = (bundle / "evidence.jsonl").read_bytes().splitlines(keepends=True)
    (bundle / "evidence.jsonl").write_bytes(b"".join(lines[:-1]))
    sign_again(bundle, nothing)
    fails(bundle, r"evidence\.jsonl: does not end at the signed head")


def test_a_wrong_manifest_is_found_even_when_signed(bundle: Path):
    def swap(statement: dict[str, Any]) -> None:
        (bundle / "manifest.json").write_text('{"schema_version": 1, "sha256": {}}')
        for subject in statement["subject"]:
            if subject["name"] == "manifest.json":
                subject["digest"]["sha256"] = sha256_hex((bundle / "manifest.json").read_bytes())

    sign_again(bundle, swap)
    fails(bundle, r"manifest\.json: does not list")


def test_a_refusal_that_carries_volumes_or_weights_is_refused(released: Path, refusal: Path):
    shutil.copytree(released / "sub-synth00001", refusal / "sub-synth00001")
    shutil.copy(released / "generator.safetensors", refusal)
    sign_again(refusal, nothing)
    fails(refusal, r"(?s)generator\.safetensors: does not belong.*nii\.gz: does not belong in a refusal")


def test_a_release_without_generator_is_refused(bundle: Path):
    (bundle / "generator.safetensors").unlink()
    sign_again(bundle, nothing)
    fails(bundle, r"generator\.safetensors: is missing from a release")


def test_an_expired_release_fails_with_its_date_and_not_a_moment_before(released: Path):
    expiry = NOW + timedelta(days=365)
    assert verify_bundle(released, trusted_key=None, now=expiry - timedelta(seconds=1)).outcome is Outcome.RELEASE
    fails(released, "expired on 2027-11-20", now=expiry)


def test_a_release_from_the_future_fails(released: Path):
    fails(released, "ahead of this computer's clock", now=NOW - timedelta(seconds=1))


def test_a_refusal_does_not_expire(refused: Path):
    later = NOW + timedelta(days=4000)
    assert verify_bundle(refused, trusted_key=None, now=later).outcome is Outcome.INCONCLUSIVE


def test_an_empty_folder_and_a_path_that_is_none_are_told_apart(tmp_path: Path):
    fails(tmp_path, r"(?s)attestation\.dsse\.json: is missing.*auditor\.pub\.pem: is missing")
    with pytest.raises(UsageError, match="is not a folder"):
        verify_bundle(tmp_path / "nowhere", trusted_key=None, now=LATER)


# --- one byte of every file, receipts, and what comes later -------------------------------------------------------


def test_one_changed_byte_of_each_file_is_found_and_the_file_named(bundle: Path):
    countersigned(bundle)
    listed(bundle / "revocations.dsse.json", bundle, release="1" * 64, decision="2" * 64)
    for path in files_of(bundle):
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
        fails(bundle, re.escape(path.relative_to(bundle).as_posix()))
        path.write_bytes(good)
    assert verify_bundle(bundle, trusted_key=None, now=LATER).outcome is Outcome.RELEASE


def countersigned(folder: Path, role: str = "data-protection officer", key: Ed25519PrivateKey | None = None) -> Path:
    verified = verify_bundle(folder, trusted_key=None, now=LATER)
    return add_countersignature(
        folder,
        release_digest=verified.digest,
        predicate=verified.predicate,
        auditor=verified.key_fingerprint,
        role=role,
        key=key or Ed25519PrivateKey.generate(),
        now=LATER,
    )


def listed(path: Path, bundle: Path, *, release: str, decision: str) -> bytes:
    """A list of revocations by the auditor of a bundle."""
    key = load_signing_key(bundle.parent / "auditor.key")
    revoke(path, release_digest=release, decision_id=decision, reason="found in a test of lists", key=key, now=LATER)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def _auditors_key(released: Path, tmp_path: Path) -> None:
    shutil.copy2(released.parent / "auditor.key", tmp_path / "auditor.key")


def replace_receipt(bundle: Path, site: str, envelope: str) -> None:
    """As an auditor might: another receipt, and everything signed so that files and decision agree."""
    path = bundle / "receipts" / f"{site}.dsse.json"
    path.write_text(envelope)
    change_site(bundle, site, receipt=sha256_hex(envelope.encode()))


def change_site(bundle: Path, site: str, **facts: Any) -> None:
    """The decision says something else of a site, and everything is signed anew."""
    change_decision(bundle, lambda decision: decision["sites"][site].update(facts))


def change_decision(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The decision says something else, and everything is signed anew."""
    old = json.loads((bundle / "decision.json").read_text())["decision_id"]
    statement = json.loads(parse_envelope((bundle / ATTESTATION).read_bytes(), ATTESTATION, Purpose.RELEASE).payload)
    predicate = statement["predicate"]
    change(predicate["decision"])
    new = sha256_hex(canonical_json(predicate["decision"]))
    chain = read_chain((bundle / "evidence.jsonl").read_bytes(), "evidence.jsonl")
    (bundle / "evidence.jsonl").unlink()
    again = EvidenceChain(bundle / "evidence.jsonl")
    for record in chain:
        again.append(
            record.kind, {**record.body, **({"decision_id": new} if "decision_id" in record.body else {})}, NOW
        )
    predicate.update(decision_id=new, evidence_head=again.head)
    (bundle / "decision.json").write_text(json.dumps(predicate))
    for name in ("card.md", "report.html"):
        (bundle / name).write_text((bundle / name).read_text().replace(old, new))
    card = json.loads((bundle / "card.json").read_text())
    card.update(decision_id=new, **{name: predicate["decision"][name] for name in ("sites", "audit")})
    (bundle / "card.json").write_text(json.dumps(card))
    sign_again(bundle, lambda statement: statement.update(predicate=predicate))


def forged(bundle: Path, site: str, key: Ed25519PrivateKey, **changes: Any) -> str:
    receipt = read_receipt((bundle / "receipts" / f"{site}.dsse.json").read_bytes(), "receipt")
    return sign_receipt(receipt.model_copy(update=changes), key)


def test_a_bundle_whose_decision_is_signed_anew_without_a_change_still_verifies(bundle: Path):
    change_site(bundle, "site-1")
    assert verify_bundle(bundle, trusted_key=None, now=LATER).outcome is Outcome.RELEASE


def first_bound(decision: dict[str, Any]) -> dict[str, Any]:
    return decision["audit"]["bounds"][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(reasons=["too few patients"]), "its decision names objections"),
        (lambda d: d.update(audit=None), "its audit is missing"),
        (lambda d: d["audit"].update(verdict="fail"), r"its audit did not pass \(fail\)"),
        (lambda d: d["audit"].update(reasons=["it leaks"]), "its audit did not pass"),
        (lambda d: d["audit"].update(controls_caught=False), "its audit did not catch its own controls"),
        (lambda d: d["audit"].update(bounds=[]), "its audit measured nothing that the study limits"),
        (lambda d: first_bound(d).update(threshold=first_bound(d)["upper"] - 1e-6), "its audit does not show fused"),
        (lambda d: first_bound(d).update(upper=None), "its audit does not show fused: AUC to be within the limit"),
    ],
)
def test_a_release_that_its_own_facts_forbid_is_refused_even_when_signed(bundle: Path, change: Any, words: str):
    change_decision(bundle, change)
    fails(bundle, rf"attestation\.dsse\.json: was released although {words}")


def test_a_bound_at_its_threshold_is_within_it(bundle: Path):
    change_decision(bundle, lambda d: first_bound(d).update(upper=first_bound(d)["threshold"]))
    assert verify_bundle(bundle, trusted_key=None, now=LATER).outcome is Outcome.RELEASE


def test_another_study_than_the_one_decided_on_is_refused_even_when_signed(bundle: Path):
    study = json.loads((bundle / "study.json").read_text())
    study["release"]["unsafe_bypass"] = True
    (bundle / "study.json").write_bytes(canonical_json(study))
    sign_again(bundle, nothing)
    fails(bundle, r"study\.json: is not the study that the decision is about")


def test_a_receipt_by_a_key_that_the_site_did_not_enrol_with_is_found_even_when_signed(bundle: Path):
    thief = Ed25519PrivateKey.generate()
    replace_receipt(bundle, "site-1", forged(bundle, "site-1", thief))
    fails(bundle, r"receipts/site-1\.dsse\.json: was signed by key")
    change_site(bundle, "site-1", receipt_key=public_key_hex(thief.public_key()))
    fails(bundle, r"evidence\.jsonl: site-1 enrolled with another receipt key")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"study_digest": "f" * 64}, "another study"),
        ({"ledger_head": "f" * 64}, "another head"),
        ({"holdout_commitment": "f" * 64}, "another hold-out"),
        ({"members": ()}, "other mechanisms"),
        ({"answers": ()}, "generator of round 1"),
    ],
)
def test_a_sites_own_receipt_that_contradicts_the_decision_is_found_even_when_signed(
    bundle: Path, changes: dict[str, Any], words: str
):
    replace_receipt(bundle, "site-1", forged(bundle, "site-1", SITE_KEYS["site-1"], **changes))
    fails(bundle, rf"receipts/site-1\.dsse\.json: the receipt .*{words}")


def test_the_receipt_of_another_site_is_found_even_when_signed(bundle: Path):
    replace_receipt(bundle, "site-1", (bundle / "receipts" / "site-2.dsse.json").read_text())
    fails(bundle, r"receipts/site-1\.dsse\.json: was signed by key")


def test_a_release_without_one_of_its_receipts_is_refused_even_when_signed(bundle: Path):
    (bundle / "receipts" / "site-2.dsse.json").unlink()
    sign_again(bundle, nothing)
    fails(bundle, r"receipts/site-2\.dsse\.json: is missing")
    change_site(bundle, "site-2", receipt=None)
    fails(bundle, r"receipts/site-2\.dsse\.json: is missing from a release")


def test_a_receipt_that_the_decision_does_not_name_is_refused_even_when_signed(bundle: Path):
    shutil.copy(bundle / "receipts" / "site-1.dsse.json", bundle / "receipts" / "site-9.dsse.json")
    sign_again(bundle, nothing)
    fails(bundle, r"receipts/site-9\.dsse\.json: is a receipt that the decision does not name")


def test_a_countersignature_changes_nothing_that_was_signed_and_is_shown(bundle: Path):
    before = verify_bundle(bundle, trusted_key=None, now=LATER).digest
    key = Ed25519PrivateKey.generate()
    countersigned(bundle, key=key)
    verified = verify_bundle(bundle, trusted_key=None, now=LATER, reviewers={"dpo.pem": public_pem(key.public_key())})
    assert verified.digest == before
    assert [(s.role, s.fingerprint) for s in verified.countersigned] == [
        ("data-protection officer", fingerprint(key.public_key()))
    ]


def test_a_reviewer_that_the_caller_asks_for_and_that_did_not_sign_is_named(bundle: Path):
    countersigned(bundle)
    asked = {"dpo.pem": public_pem(Ed25519PrivateKey.generate().public_key())}
    fails(bundle, r"countersignatures: there is none by the key in dpo\.pem", reviewers=asked)


def test_a_countersignature_of_another_bundle_is_refused(bundle: Path, refusal: Path):
    path = countersigned(refusal)
    (bundle / "countersignatures").mkdir()
    shutil.copy(path, bundle / "countersignatures")
    fails(bundle, r"countersignatures/.*: was made for another bundle")


def test_a_countersignature_in_somebody_elses_name_is_refused(bundle: Path):
    path = countersigned(bundle)
    body = parse_envelope(path.read_bytes(), path.name, Purpose.COUNTERSIGNATURE).payload
    path.write_bytes(seal(body, Ed25519PrivateKey.generate(), Purpose.COUNTERSIGNATURE))
    fails(bundle, r"countersignatures/.*: was signed by key")


def test_a_key_countersigns_once_and_as_printable_text(bundle: Path):
    key = Ed25519PrivateKey.generate()
    countersigned(bundle, key=key)
    with pytest.raises(UsageError, match="this key has signed"):
        countersigned(bundle, key=key)
    with pytest.raises(UsageError, match="printable"):
        countersigned(bundle, role="\x1b[2J")


def test_the_same_key_under_another_file_name_is_no_second_reviewer(bundle: Path):
    path = countersigned(bundle)
    shutil.copy(path, path.with_name("z-another-reviewer.dsse.json"))
    fails(bundle, rf"z-another-reviewer\.dsse\.json: is by the key of countersignatures/{re.escape(path.name)}")


def test_the_auditor_does_not_review_themselves(bundle: Path):
    key = load_signing_key(bundle.parent / "auditor.key")
    with pytest.raises(UsageError, match="the auditor's own key"):
        countersigned(bundle, key=key)
    assert not (bundle / "countersignatures").exists()
    verified = verify_bundle(bundle, trusted_key=None, now=LATER)
    facts = {"release_digest": verified.digest, "predicate": verified.predicate, "role": "reviewer", "now": LATER}
    add_countersignature(bundle, auditor="somebody else", key=key, **facts)  # by another program
    fails(bundle, r"countersignatures/.*: is by the key of the auditor")


def test_nothing_else_can_hide_among_what_comes_later(bundle: Path):
    (bundle / "countersignatures").mkdir()
    (bundle / "countersignatures" / "notes.txt").write_text("hello")
    fails(bundle, r"countersignatures/notes\.txt")


def test_a_release_on_the_auditors_list_is_refused_with_date_and_reason(bundle: Path, tmp_path: Path):
    verified = verify_bundle(bundle, trusted_key=None, now=LATER)
    data = listed(tmp_path / "list", bundle, release=verified.digest, decision=verified.predicate.decision_id)
    fails(bundle, r"list: this release was revoked on 2026-11-21 .*found in a test", revocations=("list", data))
    (bundle / "revocations.dsse.json").write_bytes(data)
    fails(bundle, r"revocations\.dsse\.json: this release was revoked")


def test_a_list_that_is_not_the_auditors_or_is_older_than_the_bundles_is_refused(bundle: Path, tmp_path: Path):
    old = listed(tmp_path / "list", bundle, release="1" * 64, decision="2" * 64)
    new = listed(tmp_path / "list", bundle, release="3" * 64, decision="4" * 64)
    assert verify_bundle(bundle, trusted_key=None, now=LATER, revocations=("list", new)).revocations is not None
    (bundle / "revocations.dsse.json").write_bytes(new)
    fails(bundle, "list: is list 1, older than list 2", revocations=("list", old))
    thief = Ed25519PrivateKey.generate()
    facts = {"release_digest": "1" * 64, "decision_id": "2" * 64, "reason": "not the auditor", "now": LATER}
    revoke(tmp_path / "other", key=thief, **facts)
    fails(bundle, "other: was signed by key", revocations=("other", (tmp_path / "other").read_bytes()))
    shutil.copy(tmp_path / "other", bundle / "revocations.dsse.json")
    fails(bundle, r"revocations\.dsse\.json: was signed by key")
