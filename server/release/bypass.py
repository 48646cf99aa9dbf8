"""Handing out what the gate refused. Unsafe, named so, and impossible unless every hospital agreed to the possibility.

The switch is `release.unsafe_bypass` of the study, off by default. It is there and not on the coordinator's machine
because a hospital's policy approves a study by its digest: whoever would overrule the gate cannot grant themselves the
right to, and a study that grants it says so first in its card, its report and to `consilium verify`.

(1) the run is finished, and its refusal, signed with the run's own key, verifies
(2) the study that was decided on allows it, and the folder's name says UNSAFE
(3) the candidates are those that were audited
(4) the bypass is recorded in the run's evidence, then written: volumes only, never the generator's weights
Neither the decision nor the signed refusal in the run changes; the candidates stay in quarantine.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from common.errors import IntegrityError, Refusal, UsageError
from common.evidence.bundle_receipts import receipt_name
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import Bypass, Outcome, Predicate
from common.evidence.signing import load_signing_key, public_pem
from common.evidence.verification import REPORT, REPORT_DATA, verify_bundle
from common.settings.load import study_digest
from server.release.bundle import Dossier, write_unsafe
from server.release.gate import Decision
from server.run_folder import RunFolder
from server.utility import UtilityResult


def bypass_gate(run: RunFolder, target: Path, *, reason: str, now: datetime) -> Predicate:
    """Steps (1) to (4). now: aware.

    Raises UsageError for a run that was released, a reason that is not 10 to 500 printable characters, or a folder
    whose name does not say UNSAFE; Refusal when the study forbids it; IntegrityError when the run's study is not the
    one that was decided on; what `verify_bundle` and `write_unsafe` raise.
    """
    key = load_signing_key(run.auditor_key)
    verified = verify_bundle(run.release, trusted_key=public_pem(key.public_key()), now=now)  # (1)
    facts = verified.predicate.decision
    if facts.outcome is Outcome.RELEASE:
        raise UsageError(f"the gate released this run: {run.release} is the release. Nothing was bypassed.")
    study = run.study
    if study_digest(study) != facts.study_digest:
        raise IntegrityError(
            f"{run.study_file} is not the study that was decided on; nothing was written. "
            f"Restore it from {run.release}: only what the hospitals approved can allow a bypass."
        )
    if not study.release.unsafe_bypass:  # (2)
        raise Refusal(
            f"the gate decided {facts.outcome} and the study forbids to overrule it (release.unsafe_bypass); "
            "nothing was written. Only a study that its hospitals approved with that switch allows it."
        )
    if "UNSAFE" not in target.name:
        raise UsageError(
            f"--out {target} does not say what it would hold; nothing was written. "
            f"Choose a name with UNSAFE in it, such as {target.name}-UNSAFE."
        )
    try:
        bypass = Bypass(reason=reason, refusal=verified.digest)
    except ValidationError as error:
        raise UsageError("the reason must be 10 to 500 printable characters; nothing was written.") from error
    if target.exists():  # before the record: what is recorded was handed out
        raise UsageError(f"{target} is there already; nothing was written. Choose another folder or remove it.")
    receipts = {site: run.release / receipt_name(site) for site, stated in facts.sites.items() if stated.receipt}
    dossier = Dossier(
        study=study,
        decision=Decision(facts=facts),
        report_html=(run.release / REPORT).read_text(encoding="utf-8"),
        report_data=data.read_bytes() if (data := run.release / REPORT_DATA).exists() else None,
        utility=UtilityResult.from_json(run.utility.read_text(encoding="utf-8")) if run.utility.exists() else None,
        receipts={site: path.read_text(encoding="utf-8") for site, path in receipts.items()},
        audit=run.audit,
    )
    return write_unsafe(  # (3) (4)
        target,
        dossier=dossier,
        candidates=run.candidates,
        bypass=bypass,
        chain=EvidenceChain(run.evidence),
        key=key,
        now=now,
    )
