"""Whether a bundle is what its auditor signed. Offline; needs the folder and, better, the auditor's key.

Steps, each repeated where it happens:
(1) the folder holds ordinary files only, and an attestation and a public key among them
(2) the attestation is a well-formed envelope
(3) it is signed by the public key in the bundle, which is the trusted key where one is given
(4) it holds a release statement whose decision has the id it names
(5) every file is a subject of the statement, every subject is a file, every SHA-256 is right; only countersignatures
    and a list of revocations, which come later, are neither
(6) manifest.json lists the same digests, and says UNSAFE where the gate was bypassed
(7) the evidence chain holds, ends at the signed head, and its last record is this decision, or its bypass
(8) decision.json says what was signed, and study.json, where there is one, is the study that it is about
(9) the card and the report carry the signed decision and its epsilon
(10) a release holds a generator and volumes, and its decision has no objection and an audit that passed within its
    own limits; a refusal holds neither; a bypassed refusal holds volumes only
(11) each site's receipt is signed by the key it enrolled with, and says what the decision says
(12) the release was issued and has not expired
(13) every countersignature is one of this bundle, and those that the caller asks for are there
(14) no list of revocations names it, and the list is the auditor's and no older than the one in the bundle
Whoever calls this decides what a signed refusal, or a bypassed one, means; here it is an authentic bundle like any
other, which is no release.

Without a trusted key step 3 shows only that all files belong together: whoever replaces every
file and the key makes a bundle that holds. Compare the fingerprint with the auditor's own word.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.errors import UsageError, VerificationFailed
from common.evidence.bundle_receipts import RECEIPTS, check_receipts
from common.evidence.canonical import parse_json, sha256_hex
from common.evidence.chain import Record, read_chain
from common.evidence.countersignature import COUNTERSIGNATURES, Countersignature, check_countersignatures
from common.evidence.predicate import (
    BYPASS_RECORD,
    DECISION_RECORD,
    DecisionFacts,
    Outcome,
    Predicate,
    Statement,
    read_statement,
    utc_text,
)
from common.evidence.revocation import REVOCATIONS, RevocationList, check_revocations
from common.evidence.signing import Envelope, Purpose, fingerprint, parse_envelope, read_public_pem, signed_by

ATTESTATION = "attestation.dsse.json"
PUBLIC_KEY = "auditor.pub.pem"
MANIFEST = "manifest.json"
DECISION = "decision.json"
EVIDENCE = "evidence.jsonl"
CARD = "card.json"
CARD_TEXT = "card.md"
REPORT = "report.html"
STUDY = "study.json"  # bundles of earlier versions have none
REPORT_DATA = "report.json"  # what the report was drawn from; not every bundle has it
GENERATOR = "generator.safetensors"
GENERATOR_SPEC = "generator.json"

_READ_WHOLE = {
    *(ATTESTATION, PUBLIC_KEY, MANIFEST, DECISION, EVIDENCE),
    *(CARD, CARD_TEXT, REPORT, REPORT_DATA, REVOCATIONS),
}
_READ_FOLDERS = (f"{RECEIPTS}/", f"{COUNTERSIGNATURES}/")
_MOST_BYTES = 256 * 2**20  # a parsed file above this is an attack on the reader, not a record of a campaign
_MOST_NAMED = 20  # problems listed in one text


@dataclass(frozen=True, kw_only=True)
class Verified:
    """An authentic bundle. pinned: the signature was checked against a key the caller trusts.

    digest: SHA-256 of the attestation, the name of this very bundle. findings: what was checked, in words.
    countersigned: who else signed it, each under a key of its own. revocations: the newest list it was held against.
    """

    predicate: Predicate
    key_fingerprint: str
    pinned: bool
    digest: str
    files: int
    findings: tuple[str, ...]
    countersigned: tuple[Countersignature, ...]
    revocations: RevocationList | None

    @property
    def outcome(self) -> Outcome:
        """RELEASE, or the refusal that was signed."""
        return self.predicate.decision.outcome


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """Digests of all files by relative path, and the bytes of those that are read; one read serves both."""

    digests: Mapping[str, str]
    data: Mapping[str, bytes]

    def below(self, folder: str) -> dict[str, bytes]:
        """Bytes of all files under a folder, by name."""
        return {name: data for name, data in self.data.items() if name.startswith(f"{folder}/")}


def verify_bundle(
    folder: Path,
    *,
    trusted_key: bytes | None,
    now: datetime,
    revocations: tuple[str, bytes] | None = None,
    reviewers: Mapping[str, bytes] | None = None,
) -> Verified:
    """Check a release or a signed refusal.

    trusted_key: PEM of the auditor's public key, obtained elsewhere; None checks integrity only. now: aware.
    revocations: name and bytes of the auditor's list; the one in the bundle, if any, is read in any case.
    reviewers: PEM by name of keys that must have countersigned. Raises VerificationFailed naming every file that does
    not hold, UsageError when `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; nothing was verified")
    contents = _read(folder)  # (1)
    envelope = parse_envelope(contents.data[ATTESTATION], ATTESTATION, Purpose.RELEASE)  # (2)
    key = _signer(contents.data[PUBLIC_KEY], envelope, trusted_key)  # (3)
    statement = read_statement(envelope.payload, ATTESTATION)  # (4)
    predicate = statement.predicate
    if predicate.decision.id != predicate.decision_id:
        raise VerificationFailed(f"{ATTESTATION}: its decision does not have the id it names")
    _check_subjects(statement, contents)  # (5)
    _check_manifest(predicate, contents)  # (6)
    records = _check_evidence(predicate, contents)  # (7)
    _check_decision(predicate, contents)  # (8)
    _check_card_and_report(predicate, contents)  # (9)
    _check_substance(predicate, contents)  # (10)
    receipts = check_receipts(predicate, records, contents.below(RECEIPTS), evidence=EVIDENCE)  # (11)
    _check_dates(predicate, now)  # (12)
    this = contents.digests[ATTESTATION]
    countersigned = check_countersignatures(  # (13)
        contents.below(COUNTERSIGNATURES), release_digest=this, predicate=predicate, auditor=fingerprint(key)
    )
    _check_reviewers(countersigned, reviewers or {})
    newest = check_revocations(  # (14)
        revocations[1] if revocations else None,
        contents.data.get(REVOCATIONS),
        name=revocations[0] if revocations else REVOCATIONS,
        key=key,
        release_digest=this,
        decision_id=predicate.decision_id,
    )
    return Verified(
        predicate=predicate,
        key_fingerprint=fingerprint(key),
        pinned=trusted_key is not None,
        digest=this,
        files=len(contents.digests),
        countersigned=countersigned,
        revocations=newest,
        findings=(
            f"{len(contents.digests)} files, each with the signed SHA-256",
            f"signature by {'the trusted key' if trusted_key else 'the key in the bundle'}",
            f"evidence chain of {len(records)} records up to the signed head",
            f"receipts of {receipts} sites, each signed with the key it enrolled with",
            "decision, card and report agree with what was signed",
        ),
    )


def _read(folder: Path) -> _Contents:
    """Hash every file. A link or a device could show a verifier one thing and a reader another."""
    digests: dict[str, str] = {}
    kept: dict[str, bytes] = {}
    odd: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        for name in sorted([*folders, *files]):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                keep = relative in _READ_WHOLE or relative.startswith(_READ_FOLDERS)
                digests[relative], data = _hash(path, relative, keep=keep)
                if data is not None:
                    kept[relative] = data
            elif not stat.S_ISDIR(mode):
                odd.append(f"{_shown(relative)}: is a {'link' if stat.S_ISLNK(mode) else 'special file'}")
    odd += [f"{name}: is missing" for name in (ATTESTATION, PUBLIC_KEY) if name not in digests]
    _fail_on(odd)
    return _Contents(digests=digests, data=kept)


def _hash(path: Path, name: str, *, keep: bool) -> tuple[str, bytes | None]:
    try:
        if keep:
            if path.stat().st_size > _MOST_BYTES:
                raise VerificationFailed(f"{name}: is larger than {_MOST_BYTES} bytes and was not read")
            data = path.read_bytes()
            return sha256_hex(data), data
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), None
    except OSError as error:
        raise VerificationFailed(f"{_shown(name)}: cannot be read ({error.strerror})") from error


def _unreadable(error: OSError) -> None:
    raise VerificationFailed(f"{_shown(str(error.filename))}: cannot be read ({error.strerror})") from error


def _signer(pem: bytes, envelope: Envelope, trusted_key: bytes | None) -> Ed25519PublicKey:
    """The key that signed. Tells an altered key from an altered attestation."""
    key = read_public_pem(pem, PUBLIC_KEY)
    if trusted_key is not None:
        trusted = read_public_pem(trusted_key, "the trusted key")
        if fingerprint(trusted) != fingerprint(key):
            raise VerificationFailed(
                f"{PUBLIC_KEY}: its fingerprint is {fingerprint(key)}, the trusted key's is {fingerprint(trusted)}; "
                "the bundle was signed by somebody else. Ask the auditor for the right bundle or key."
            )
    claimed = envelope.keyid == fingerprint(key)
    if not signed_by(envelope, key):
        altered = ATTESTATION if claimed else PUBLIC_KEY
        raise VerificationFailed(f"{altered}: the signature does not hold under the key in {PUBLIC_KEY}")
    if not claimed:
        raise VerificationFailed(f"{ATTESTATION}: names another key than the one that signed it")
    return key


def _came_later(name: str) -> bool:
    """Whether a file may lie in a bundle without being under the auditor's signature; it has one of its own."""
    return name == REVOCATIONS or name.startswith(f"{COUNTERSIGNATURES}/")


def _check_subjects(statement: Statement, contents: _Contents) -> None:
    names = [subject.name for subject in statement.subject]
    if names != sorted(set(names)):
        raise VerificationFailed(f"{ATTESTATION}: its subjects are repeated or out of order")
    unsafe = [name for name in names if not _is_safe(name)]
    if unsafe:
        raise VerificationFailed(f"{ATTESTATION}: a subject lies outside of the bundle: {_shown(unsafe[0])}")
    signed = {subject.name: subject.digest["sha256"] for subject in statement.subject}
    found = {n: digest for n, digest in contents.digests.items() if n != ATTESTATION and not _came_later(n)}
    problems = [f"{_shown(name)}: is missing" for name in sorted(signed.keys() - found.keys())]
    problems += [f"{_shown(name)}: is not part of what was signed" for name in sorted(found.keys() - signed.keys())]
    problems += [
        f"{_shown(name)}: was changed after it was signed"
        for name in sorted(signed.keys() & found.keys())
        if signed[name] != found[name]
    ]
    _fail_on(problems)


def _check_manifest(predicate: Predicate, contents: _Contents) -> None:
    manifest = _object(contents, MANIFEST)
    expected = {
        name: digest
        for name, digest in contents.digests.items()
        if name not in {ATTESTATION, MANIFEST} and not _came_later(name)
    }
    if manifest.get("sha256") != expected:
        raise VerificationFailed(f"{MANIFEST}: does not list the digests of the files in the bundle")
    if manifest.get("unsafe") != (predicate.bypass.reason if predicate.bypass else None):
        raise VerificationFailed(f"{MANIFEST}: does not say what was signed about a bypass of the gate")


def _check_evidence(predicate: Predicate, contents: _Contents) -> tuple[Record, ...]:
    records = read_chain(_bytes(contents, EVIDENCE), EVIDENCE)
    if not records or records[-1].digest != predicate.evidence_head:
        raise VerificationFailed(f"{EVIDENCE}: does not end at the signed head; records were added or cut off")
    last = records[-1]
    if predicate.bypass is not None:
        if (last.kind, last.body.get("reason")) != (BYPASS_RECORD, predicate.bypass.reason):
            raise VerificationFailed(f"{EVIDENCE}: its last record is not the signed bypass")
    elif last.kind != DECISION_RECORD:
        raise VerificationFailed(f"{EVIDENCE}: its last record is not a decision")
    decisions = [record for record in records if record.kind == DECISION_RECORD]
    if not decisions or {last.body.get("decision_id"), decisions[-1].body.get("decision_id")} != {
        predicate.decision_id
    }:
        raise VerificationFailed(f"{EVIDENCE}: its last decision is not the signed one")
    return records


def _check_decision(predicate: Predicate, contents: _Contents) -> None:
    if _object(contents, DECISION) != predicate.json_value():
        raise VerificationFailed(f"{DECISION}: does not say what was signed in {ATTESTATION}")
    # A study's digest is that of its canonical JSON, which is what bundles hold.
    if contents.digests.get(STUDY, predicate.decision.study_digest) != predicate.decision.study_digest:
        raise VerificationFailed(f"{STUDY}: is not the study that the decision is about")


def _check_card_and_report(predicate: Predicate, contents: _Contents) -> None:
    card, signed = _object(contents, CARD), predicate.json_value()["decision"]
    if card.get("decision_id") != predicate.decision_id:
        raise VerificationFailed(f"{CARD}: is the card of another decision")
    if card.get("bypass", ...) != predicate.json_value()["bypass"]:
        raise VerificationFailed(f"{CARD}: does not say what was signed about a bypass of the gate")
    for name in ("outcome", "simulated", "sites", "coarser", "audit"):
        if card.get(name) != signed[name]:
            raise VerificationFailed(f"{CARD}: its {name!r} differs from what was signed in {ATTESTATION}")
    for name in (CARD_TEXT, REPORT, *({REPORT_DATA} & contents.data.keys())):
        if predicate.decision_id.encode() not in _bytes(contents, name):
            raise VerificationFailed(f"{name}: does not carry the id of the signed decision")


def _check_substance(predicate: Predicate, contents: _Contents) -> None:
    weights = {GENERATOR, GENERATOR_SPEC}
    volumes = {name for name in contents.digests if name.endswith((".nii", ".nii.gz"))}
    if predicate.decision.outcome is Outcome.RELEASE and predicate.bypass is not None:
        raise VerificationFailed(f"{ATTESTATION}: bypasses a gate that released")
    if predicate.decision.outcome is Outcome.RELEASE:
        _check_grounds(predicate.decision)
        _fail_on([f"{name}: is missing from a release" for name in sorted(weights - contents.digests.keys())])
        if not volumes:
            raise VerificationFailed(f"{ATTESTATION}: is a release without a single volume")
    else:
        leaked = {name for name in contents.digests if name.endswith(".safetensors")}
        leaked |= volumes if predicate.bypass is None else set()
        _fail_on([f"{_shown(name)}: does not belong in a refusal" for name in sorted(leaked)])


def _check_grounds(decision: DecisionFacts) -> None:
    """A release against its own facts: what the gate would have refused is none, whoever signed it."""
    audit = decision.audit
    limited = [bound for bound in audit.bounds if bound.threshold is not None] if audit else []
    above = [
        b.name for b in limited if b.threshold is not None and not (b.upper is not None and b.upper <= b.threshold)
    ]
    if decision.reasons:
        problem = "its decision names objections"
    elif audit is None:
        problem = "its audit is missing"
    elif audit.verdict != "pass" or audit.reasons:
        problem = f"its audit did not pass ({audit.verdict})"
    elif not audit.controls_caught:
        problem = "its audit did not catch its own controls"
    elif not limited:
        problem = "its audit measured nothing that the study limits"
    elif above:
        problem = f"its audit does not show {above[0]} to be within the limit"
    else:
        return
    raise VerificationFailed(f"{ATTESTATION}: was released although {problem}")


def _check_reviewers(countersigned: tuple[Countersignature, ...], reviewers: Mapping[str, bytes]) -> None:
    """Every key that the caller asks for has countersigned."""
    signed = {countersignature.fingerprint for countersignature in countersigned}
    missing = {name for name, pem in reviewers.items() if fingerprint(read_public_pem(pem, name)) not in signed}
    _fail_on([f"{COUNTERSIGNATURES}: there is none by the key in {name}" for name in sorted(missing)])


def _check_dates(predicate: Predicate, now: datetime) -> None:
    if now < predicate.issued:
        raise VerificationFailed(
            f"{ATTESTATION}: was issued on {utc_text(predicate.issued)}, which lies ahead of this computer's clock "
            f"({utc_text(now)}). Set the clock and verify again."
        )
    if predicate.expires is not None and now >= predicate.expires:
        raise VerificationFailed(
            f"{ATTESTATION}: the release expired on {utc_text(predicate.expires)}. "
            "Ask the auditor for a new decision; attacks may have become stronger."
        )
    if predicate.decision.outcome is Outcome.RELEASE and predicate.expires is None:
        raise VerificationFailed(f"{ATTESTATION}: is a release without an expiry date")


def _bytes(contents: _Contents, name: str) -> bytes:
    if name not in contents.data:
        raise VerificationFailed(f"{name}: is missing")
    return contents.data[name]


def _object(contents: _Contents, name: str) -> dict[str, object]:
    value = parse_json(_bytes(contents, name), name)
    if not isinstance(value, dict):
        raise VerificationFailed(f"{name}: is not a JSON object")
    return dict(value)


def _is_safe(name: str) -> bool:
    """A relative path with one spelling that stays inside the bundle."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name
    return inside and path.as_posix() == name


def _shown(name: str) -> str:
    """A file name that cannot steer the terminal it is printed on."""
    return name if name.isprintable() else ascii(name)


def _fail_on(problems: list[str]) -> None:
    if not problems:
        return
    more = len(problems) - _MOST_NAMED
    lines = problems[:_MOST_NAMED] + ([f"and {more} more"] if more > 0 else [])
    raise VerificationFailed("\n".join(lines))
