"""Folders that leave the gate: quarantined candidates, the signed release, the signed refusal, the bypassed one.

A bundle is built beside its target and renamed when every byte is on disk, so there is never half of one.
The auditor signs last, over the digest of every other file.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from common.errors import IntegrityError
from common.evidence.atomic import whole_folder
from common.evidence.bundle_receipts import RECEIPTS, receipt_name
from common.evidence.canonical import canonical_json, sha256_hex
from common.evidence.chain import EvidenceChain, Record
from common.evidence.countersignature import COUNTERSIGNATURES
from common.evidence.predicate import BYPASS_RECORD, DECISION_RECORD, Bypass, Outcome, Predicate, statement_payload
from common.evidence.revocation import REVOCATIONS
from common.evidence.signing import Purpose, public_pem, seal
from common.evidence.verification import (
    ATTESTATION,
    CARD,
    CARD_TEXT,
    DECISION,
    EVIDENCE,
    GENERATOR,
    GENERATOR_SPEC,
    MANIFEST,
    PUBLIC_KEY,
    REPORT,
    REPORT_DATA,
    STUDY,
)
from common.generator.network import save_weights
from common.generator.released import generator_spec
from common.generator.weights import Weights
from common.settings.load import study_json
from common.settings.study import Study
from common.telemetry.events import Observer, Progress, ignore
from common.volume.bids import (
    DatasetDescription,
    DatasetKind,
    subject_name,
    write_dataset,
    write_image_facts,
    write_pair,
)
from common.volume.prepare import restore
from server.release.card import card_facts, card_text
from server.release.croissant import CROISSANT, croissant_facts
from server.release.gate import Decision

if TYPE_CHECKING:
    from server.utility import UtilityResult

AUDIT = "audit"
UNSAFE = "UNSAFE.txt"
QUARANTINE = "QUARANTINE.txt"
_QUARANTINE_TEXT = (
    "These volumes are under quarantine: no gate has released them. Do not copy or use them.\n"
    "If the gate decides RELEASE they move into a signed bundle; otherwise they stay here.\n"
)
_UNSAFE_TEXT = (
    "UNSAFE. The release gate decided {outcome}. Somebody overruled it and handed out these volumes all the same.\n"
    "They may contain scans of patients. They are not a release; `consilium verify` will never call them one.\n\n"
    "Reason that was given: {reason}\n"
)
_MANIFEST_VERSION = 2
# Public, or answers that were noised and paid for: without them the report would be a claim nobody can check.
_AUDIT_FILES = ("plan.json", "plan.dsse.json", "canaries.json", "answers.json", "result.json")
_OURS = (
    *(CARD, CARD_TEXT, REPORT, DECISION, GENERATOR, GENERATOR_SPEC, EVIDENCE, MANIFEST, ATTESTATION, PUBLIC_KEY),
    *(CROISSANT, STUDY, REPORT_DATA, AUDIT, RECEIPTS, COUNTERSIGNATURES, REVOCATIONS, UNSAFE),
)


@dataclass(frozen=True, kw_only=True)
class Dossier:
    """What every signed outcome carries.

    report_html: a self-contained page. report_data: the same as canonical JSON, None when there is none. utility:
    None when not measured. receipts: envelopes by site, those that hold.
    audit: folder with the plan, the answers and the result that the report shows; None when there was no audit.
    """

    study: Study
    decision: Decision
    report_html: str
    report_data: bytes | None = None
    utility: UtilityResult | None = None
    receipts: Mapping[str, str] = field(default_factory=dict)
    audit: Path | None = None


def write_candidates(
    folder: Path, pairs: Iterable[NDArray[np.float32]], study: Study, observer: Observer = ignore
) -> str:
    """Write the volumes that may be released, under quarantine; their digest, which the decision is about.

    pairs: (1+K, D, H, W) each, in order. Raises UsageError when `folder` holds anything, IntegrityError for a
    volume that is not finite, ConsiliumError when the disk does not take it; then nothing is left.
    """
    grid = study.grid.as_grid()
    with whole_folder(folder) as part:
        (part / QUARANTINE).write_text(_QUARANTINE_TEXT, encoding="utf-8")
        for number, pair in enumerate(pairs, start=1):
            if not np.isfinite(pair).all():
                raise IntegrityError(f"synthetic volume {number} holds a value that is not finite; none was kept")
            image, label = restore(pair, labels=study.labels, grid=grid)
            write_pair(
                part,
                kind=DatasetKind.DERIVATIVE,
                subject=subject_name(number),
                suffix=study.modality,
                image=image,
                label=label,
            )
            observer(Progress(task="candidates", done=number, total=study.release.volumes))
    return candidates_digest(folder)


def candidates_digest(folder: Path) -> str:
    """SHA-256 over names and digests of all candidate volumes."""
    return sha256_hex(canonical_json({**_digests(folder, without={QUARANTINE})}))


def record_decision(chain: EvidenceChain, decision: Decision, now: datetime) -> Record:
    """Append the decision, which every bundle's chain must end with; a repeated call appends nothing."""
    records = chain.verify()
    if records and records[-1].kind == DECISION_RECORD and records[-1].body.get("decision_id") == decision.id:
        return records[-1]
    body = {"decision_id": decision.id, "outcome": decision.outcome.value, "reasons": list(decision.reasons)}
    return chain.append(DECISION_RECORD, body, now)


def write_release(
    target: Path,
    *,
    dossier: Dossier,
    candidates: Path,
    generator: Weights,
    chain: EvidenceChain,
    key: Ed25519PrivateKey,
    now: datetime,
) -> Predicate:
    """Publish the candidates as a signed BIDS derivative; afterwards they are no longer in quarantine.

    now: aware. Raises ValueError when the decision is not RELEASE, IntegrityError when candidates or generator
    are not those it was about, UsageError or ConsiliumError as `whole_folder`; then nothing is released.
    """
    decision, study = dossier.decision, dossier.study
    if decision.outcome is not Outcome.RELEASE:
        raise ValueError(f"the decision is {decision.outcome}; only RELEASE releases")
    if generator.digest != decision.facts.generator_digest:
        raise IntegrityError("the generator is not the one that was audited; nothing was released")
    _check_candidates(candidates, decision)
    predicate = _predicate(dossier, chain, now, expires=now + timedelta(days=study.release.valid_days))
    with whole_folder(target) as part:
        subjects = _lay_out(part, dossier, predicate, candidates)
        save_weights(part / GENERATOR, generator)
        _write_json(part / GENERATOR_SPEC, generator_spec(study, generator))
        card = _write_common(part, dossier, predicate, chain, volumes=subjects)
        digests = _digests(part, without=set())
        _write_json(part / CROISSANT, croissant_facts(card=card, predicate=predicate, digests=digests))
        _sign(part, predicate, key)
    shutil.rmtree(candidates)
    return predicate


def write_refusal(
    target: Path, *, dossier: Dossier, chain: EvidenceChain, key: Ed25519PrivateKey, now: datetime
) -> Predicate:
    """Publish the signed refusal: decision, card, report and evidence, no volume and no weights.

    now: aware. Raises ValueError when the decision is RELEASE, UsageError or ConsiliumError as `whole_folder`.
    """
    if dossier.decision.outcome is Outcome.RELEASE:
        raise ValueError("the decision is RELEASE; it is not written as a refusal")
    predicate = _predicate(dossier, chain, now, expires=None)
    with whole_folder(target) as part:
        _write_common(part, dossier, predicate, chain, volumes=0)
        _sign(part, predicate, key)
    return predicate


def write_unsafe(
    target: Path,
    *,
    dossier: Dossier,
    candidates: Path,
    bypass: Bypass,
    chain: EvidenceChain,
    key: Ed25519PrivateKey,
    now: datetime,
) -> Predicate:
    """Hand out the candidates although the decision is a refusal: volumes without the generator, UNSAFE everywhere.

    They stay in quarantine as well. now: aware. Raises ValueError when the decision is RELEASE or `target` does not say
    UNSAFE, IntegrityError when the candidates are not those it was about, UsageError or ConsiliumError as
    `whole_folder`.
    """
    decision = dossier.decision
    if decision.outcome is Outcome.RELEASE or "UNSAFE" not in target.name:
        raise ValueError("only a refusal is bypassed, into a folder that says UNSAFE")
    _check_candidates(candidates, decision)
    body = {"decision_id": decision.id, "outcome": decision.outcome.value, **bypass.model_dump(mode="json")}
    head = chain.append(BYPASS_RECORD, body, now)
    predicate = _facts(dossier, head, now, expires=None, bypass=bypass)
    with whole_folder(target) as part:
        subjects = _lay_out(part, dossier, predicate, candidates)
        text = _UNSAFE_TEXT.format(outcome=decision.outcome.value, reason=bypass.reason)
        (part / UNSAFE).write_text(text, encoding="utf-8")
        _write_common(part, dossier, predicate, chain, volumes=subjects)
        _sign(part, predicate, key)
    return predicate


def _check_candidates(candidates: Path, decision: Decision) -> None:
    if candidates_digest(candidates) != decision.facts.candidates_digest:
        raise IntegrityError(
            f"the candidates in {candidates} changed after they were audited; nothing was released. "
            "Delete that folder and repeat the audit."
        )


def _lay_out(part: Path, dossier: Dossier, predicate: Predicate, candidates: Path) -> int:
    """The candidates as a BIDS derivative; how many volumes there are."""
    shutil.copytree(candidates, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(QUARANTINE))
    subjects = sorted(path.name.removeprefix("sub-") for path in part.glob("sub-*"))
    write_dataset(part, description=_description(dossier, predicate), participants={s: {} for s in subjects})
    write_image_facts(part, suffix=dossier.study.modality)
    return len(subjects)


def _predicate(dossier: Dossier, chain: EvidenceChain, now: datetime, *, expires: datetime | None) -> Predicate:
    return _facts(dossier, record_decision(chain, dossier.decision, now), now, expires=expires, bypass=None)


def _facts(
    dossier: Dossier, head: Record, now: datetime, *, expires: datetime | None, bypass: Bypass | None
) -> Predicate:
    return Predicate(
        decision=dossier.decision.facts,
        decision_id=dossier.decision.id,
        bypass=bypass,
        evidence_head=head.digest,
        code_version=version("consilium"),
        issued=now.replace(microsecond=0),
        expires=expires.replace(microsecond=0) if expires else None,
    )


def _write_common(
    part: Path, dossier: Dossier, predicate: Predicate, chain: EvidenceChain, *, volumes: int
) -> dict[str, Any]:
    """Decision, card, report and evidence, and what they rest on: study, receipts of the sites, the audit's answers.

    Returns the facts of the card.
    """
    card = card_facts(study=dossier.study, predicate=predicate, volumes=volumes, utility=dossier.utility)
    _write_json(part / DECISION, predicate.json_value())
    _write_json(part / CARD, card)
    (part / CARD_TEXT).write_text(card_text(card), encoding="utf-8")
    (part / REPORT).write_text(_with_decision(dossier.report_html, predicate), encoding="utf-8")
    if dossier.report_data is not None:
        (part / REPORT_DATA).write_bytes(dossier.report_data)
    shutil.copyfile(chain.path, part / EVIDENCE)
    (part / STUDY).write_text(study_json(dossier.study), encoding="utf-8")
    named = {s: facts.receipt for s, facts in dossier.decision.facts.sites.items() if facts.receipt}
    if named != {site: sha256_hex(envelope.encode()) for site, envelope in dossier.receipts.items()}:
        raise IntegrityError("the sites' receipts are not those that the decision names; nothing was released")
    for site, envelope in sorted(dossier.receipts.items()):
        path = part / receipt_name(site)
        path.parent.mkdir(exist_ok=True)
        path.write_text(envelope, encoding="utf-8")
    for name in _AUDIT_FILES if dossier.audit else ():
        if dossier.audit and (dossier.audit / name).is_file():
            (part / AUDIT).mkdir(exist_ok=True)
            shutil.copyfile(dossier.audit / name, part / AUDIT / name)
    return card


def _sign(part: Path, predicate: Predicate, key: Ed25519PrivateKey) -> None:
    """The last files: key, manifest, and the attestation over all of them."""
    (part / PUBLIC_KEY).write_bytes(public_pem(key.public_key()))
    unsafe = {"unsafe": predicate.bypass.reason} if predicate.bypass else {}
    manifest = {"schema_version": _MANIFEST_VERSION, "sha256": _digests(part, without=set()), **unsafe}
    _write_json(part / MANIFEST, manifest)
    statement = statement_payload(_digests(part, without=set()), predicate)
    (part / ATTESTATION).write_bytes(seal(statement, key, Purpose.RELEASE))


def _with_decision(page: str, predicate: Predicate) -> str:
    """The report, made to name the decision it belongs to if it does not, and to say UNSAFE where it was overruled."""
    if predicate.bypass is not None:
        warning = (
            f'<div role="alert"><h1>UNSAFE: not a release</h1><p>The gate decided {predicate.decision.outcome.value} '
            f"and was overruled: {html.escape(predicate.bypass.reason)}</p></div>"
        )
        page, found = re.subn(r"<body[^>]*>", lambda match: match[0] + warning, page, count=1)
        page = page if found else warning + page
    if predicate.decision_id in page:
        return page
    outcome = html.escape(predicate.decision.outcome.value)
    line = f"<footer><p>{outcome}, decision <code>{predicate.decision_id}</code></p></footer>\n"
    body, end, rest = page.rpartition("</body>")
    return f"{body}{line}{end}{rest}" if end else page + line


def _description(dossier: Dossier, predicate: Predicate) -> DatasetDescription:
    study = dossier.study
    simulated = "SIMULATED sites: no privacy guarantee. " if predicate.decision.simulated else ""
    if predicate.bypass is not None:
        unsafe = _UNSAFE_TEXT.format(outcome=predicate.decision.outcome.value, reason=predicate.bypass.reason)
        return _described(dossier, predicate, title="UNSAFE, not a release: ", readme=unsafe)
    readme = (
        f"{study.study}: synthetic labelled {study.modality} scans\n\n"
        f"SYNTHETIC. {simulated}No volume here is a scan of a person.\n\n"
        f"Read card.md first: what this is for, how private it is and what that does not cover.\n\n"
        "consilium verify .                      checks every file against the auditor's signature, offline\n"
        "consilium sample . --n 10 --out more    draws further volumes from the released generator\n"
        "consilium release nnunet . --out raw    lays the volumes out for nnU-Net v2\n\n"
        f"Purpose of the study: {study.purpose}\n"
    )
    return _described(dossier, predicate, title="", readme=readme)


def _described(dossier: Dossier, predicate: Predicate, *, title: str, readme: str) -> DatasetDescription:
    study = dossier.study
    return DatasetDescription(
        kind=DatasetKind.DERIVATIVE,
        name=f"{title}{study.study}: synthetic {study.modality} scans",
        readme=readme,
        labels=study.labels,
        generator="Consilium",
        generator_version=predicate.code_version,
        licence=study.release.licence,
        ignored=_OURS,
        extra={
            "Authors": list(predicate.decision.sites),
            "HowToAcknowledge": f"Decision {predicate.decision_id}, issued {predicate.issued:%Y-%m-%d}.",
        },
    )


def _digests(folder: Path, *, without: set[str]) -> dict[str, str]:
    """SHA-256 of every file below `folder` by relative path."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: sha256_hex(files[name].read_bytes()) for name in sorted(files) if name not in without}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
