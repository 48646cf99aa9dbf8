"""Whether a bundle is what its auditor signed. Offline; needs the folder and, better, the auditor's key.

Steps, each repeated where it happens:
(1) the folder holds ordinary files only, and an attestation and a public key among them
(2) the attestation is a well-formed envelope
(3) it is signed by the public key in the bundle, which is the trusted key where one is given
(4) it holds a release statement whose decision has the id it names
(5) every file is a subject of the statement, every subject is a file, every SHA-256 is right
(6) manifest.json lists the same digests
(7) the evidence chain holds, ends at the signed head, and its last record is this decision
(8) decision.json says what was signed
(9) the card and the report carry the signed decision and its epsilon
(10) a release holds a generator and volumes; a refusal holds neither
(11) the release was issued and has not expired
Whoever calls this decides what a signed refusal means; here it is an authentic bundle like any other.

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
from common.evidence.canonical import parse_json, sha256_hex
from common.evidence.chain import read_chain
from common.evidence.predicate import DECISION_RECORD, Outcome, Predicate, Statement, read_statement, utc_text
from common.evidence.signing import Envelope, fingerprint, parse_envelope, read_public_pem, signed_by

ATTESTATION = "attestation.dsse.json"
PUBLIC_KEY = "auditor.pub.pem"
MANIFEST = "manifest.json"
DECISION = "decision.json"
EVIDENCE = "evidence.jsonl"
CARD = "card.json"
CARD_TEXT = "card.md"
REPORT = "report.html"
GENERATOR = "generator.safetensors"
GENERATOR_SPEC = "generator.json"

_READ_WHOLE = {ATTESTATION, PUBLIC_KEY, MANIFEST, DECISION, EVIDENCE, CARD, CARD_TEXT, REPORT}
_MOST_BYTES = 256 * 2**20  # a parsed file above this is an attack on the reader, not a record of a campaign
_MOST_NAMED = 20  # problems listed in one text


@dataclass(frozen=True, kw_only=True)
class Verified:
    """An authentic bundle. pinned: the signature was checked against a key the caller trusts.

    digest: SHA-256 of the attestation, the name of this very bundle. findings: what was checked, in words.
    """

    predicate: Predicate
    key_fingerprint: str
    pinned: bool
    digest: str
    files: int
    findings: tuple[str, ...]

    @property
    def outcome(self) -> Outcome:
        """RELEASE, or the refusal that was signed."""
        return self.predicate.decision.outcome


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """Digests of all files by relative path, and the bytes of those that are read; one read serves both."""

    digests: Mapping[str, str]
    bytes: Mapping[str, bytes]


def verify_bundle(folder: Path, *, trusted_key: bytes | None, now: datetime) -> Verified:
    """Check a release or a signed refusal.

    trusted_key: PEM of the auditor's public key, obtained elsewhere; None checks integrity only. now: aware.
    Raises VerificationFailed naming every file that does not hold, UsageError when `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; nothing was verified")
    contents = _read(folder)  # (1)
    envelope = parse_envelope(contents.bytes[ATTESTATION], ATTESTATION)  # (2)
    key = _signer(contents.bytes[PUBLIC_KEY], envelope, trusted_key)  # (3)
    statement = read_statement(envelope.payload, ATTESTATION)  # (4)
    predicate = statement.predicate
    if predicate.decision.id != predicate.decision_id:
        raise VerificationFailed(f"{ATTESTATION}: its decision does not have the id it names")
    _check_subjects(statement, contents)  # (5)
    _check_manifest(contents)  # (6)
    records = _check_evidence(predicate, contents)  # (7)
    _check_decision(predicate, contents)  # (8)
    _check_card_and_report(predicate, contents)  # (9)
    _check_substance(predicate, contents)  # (10)
    _check_dates(predicate, now)  # (11)
    return Verified(
        predicate=predicate,
        key_fingerprint=fingerprint(key),
        pinned=trusted_key is not None,
        digest=contents.digests[ATTESTATION],
        files=len(contents.digests),
        findings=(
            f"{len(contents.digests)} files, each with the signed SHA-256",
            f"signature by {'the trusted key' if trusted_key else 'the key in the bundle'}",
            f"evidence chain of {records} records up to the signed head",
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
                digests[relative], data = _hash(path, relative, keep=relative in _READ_WHOLE)
                if data is not None:
                    kept[relative] = data
            elif not stat.S_ISDIR(mode):
                odd.append(f"{_shown(relative)}: is a {'link' if stat.S_ISLNK(mode) else 'special file'}")
    odd += [f"{name}: is missing" for name in (ATTESTATION, PUBLIC_KEY) if name not in digests]
    _fail_on(odd)
    return _Contents(digests=digests, bytes=kept)


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


def _check_subjects(statement: Statement, contents: _Contents) -> None:
    names = [subject.name for subject in statement.subject]
    if names != sorted(set(names)):
        raise VerificationFailed(f"{ATTESTATION}: its subjects are repeated or out of order")
    unsafe = [name for name in names if not _is_safe(name)]
    if unsafe:
        raise VerificationFailed(f"{ATTESTATION}: a subject lies outside of the bundle: {_shown(unsafe[0])}")
    signed = {subject.name: subject.digest["sha256"] for subject in statement.subject}
    found = {name: digest for name, digest in contents.digests.items() if name != ATTESTATION}
    problems = [f"{_shown(name)}: is missing" for name in sorted(signed.keys() - found.keys())]
    problems += [f"{_shown(name)}: is not part of what was signed" for name in sorted(found.keys() - signed.keys())]
    problems += [
        f"{_shown(name)}: was changed after it was signed"
        for name in sorted(signed.keys() & found.keys())
        if signed[name] != found[name]
    ]
    _fail_on(problems)


def _check_manifest(contents: _Contents) -> None:
    listed = _object(contents, MANIFEST).get("sha256")
    expected = {name: digest for name, digest in contents.digests.items() if name not in {ATTESTATION, MANIFEST}}
    if listed != expected:
        raise VerificationFailed(f"{MANIFEST}: does not list the digests of the files in the bundle")


def _check_evidence(predicate: Predicate, contents: _Contents) -> int:
    records = read_chain(_bytes(contents, EVIDENCE), EVIDENCE)
    if not records or records[-1].digest != predicate.evidence_head:
        raise VerificationFailed(f"{EVIDENCE}: does not end at the signed head; records were added or cut off")
    if records[-1].kind != DECISION_RECORD or records[-1].body.get("decision_id") != predicate.decision_id:
        raise VerificationFailed(f"{EVIDENCE}: its last record is not the signed decision")
    return len(records)


def _check_decision(predicate: Predicate, contents: _Contents) -> None:
    if _object(contents, DECISION) != predicate.json_value():
        raise VerificationFailed(f"{DECISION}: does not say what was signed in {ATTESTATION}")


def _check_card_and_report(predicate: Predicate, contents: _Contents) -> None:
    card, signed = _object(contents, CARD), predicate.json_value()["decision"]
    if card.get("decision_id") != predicate.decision_id:
        raise VerificationFailed(f"{CARD}: is the card of another decision")
    for name in ("outcome", "simulated", "sites", "coarser", "audit"):
        if card.get(name) != signed[name]:
            raise VerificationFailed(f"{CARD}: its {name!r} differs from what was signed in {ATTESTATION}")
    for name in (CARD_TEXT, REPORT):
        if predicate.decision_id.encode() not in _bytes(contents, name):
            raise VerificationFailed(f"{name}: does not carry the id of the signed decision")


def _check_substance(predicate: Predicate, contents: _Contents) -> None:
    weights = {GENERATOR, GENERATOR_SPEC}
    volumes = {name for name in contents.digests if name.endswith((".nii", ".nii.gz"))}
    if predicate.decision.outcome is Outcome.RELEASE:
        _fail_on([f"{name}: is missing from a release" for name in sorted(weights - contents.digests.keys())])
        if not volumes:
            raise VerificationFailed(f"{ATTESTATION}: is a release without a single volume")
    else:
        leaked = volumes | {name for name in contents.digests if name.endswith(".safetensors")}
        _fail_on([f"{_shown(name)}: does not belong in a refusal" for name in sorted(leaked)])


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
    if name not in contents.bytes:
        raise VerificationFailed(f"{name}: is missing")
    return contents.bytes[name]


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
