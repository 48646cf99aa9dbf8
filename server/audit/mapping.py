"""Chapter 12: what regulators ask for, row by row, with the evidence that each answer rests on.

Every row links to something: an anchor of this report, or a file that `ReportFacts.records` says is there. The rows
summarise public guidance; they are no legal advice and say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from common.evidence.verification import DECISION, EVIDENCE
from server.audit.document import Block, Chapter, Cited, Evidence, Heading, Link, Paragraph, Table
from server.audit.facts import CampaignFacts, ReportFacts
from server.audit.numerals import epsilon_text, share_text
from server.audit.result import AuditResult
from server.audit.threats import attack_title, carried_out
from server.audit.wording import WEAK_PROOF, largest_epsilon, worst_auc

AUDIT_PLAN = "audit/plan.json"
AUDIT_RESULT = "audit/result.json"

_WP216 = "Three criteria of the Article 29 Working Party's opinion 05/2014 (WP216)"
_NIST = "Hazards of NIST SP 800-226, guidelines for evaluating differential privacy guarantees"
_ISO = "Where the parts of ISO/IEC 27559:2022 are found in this report"
_LAW = "Data protection law: when a model is personal data itself"
_HEADINGS = {  # anchor and heading
    _WP216: ("wp216", "WP216"),
    _NIST: ("nist-800-226", "NIST SP 800-226"),
    _ISO: ("iso-27559", "ISO/IEC 27559"),
    _LAW: ("law", "GDPR and EDPB Opinion 28/2024"),
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row: what is asked, what was done about it, where that can be seen, what remains.

    Raises ValueError without evidence: no claim without an artefact.
    """

    scheme: str
    hazard: str
    answer: str
    evidence: tuple[Link | Cited, ...]
    residual: str

    def __post_init__(self) -> None:
        if not self.evidence:
            raise ValueError(f"{self.scheme}, {self.hazard}: a claim needs evidence")


def claims(facts: ReportFacts) -> tuple[Claim, ...]:
    """Every row of every mapping."""
    return (*_wp216(facts), *_nist(facts), *_iso(facts), *_gdpr(facts))


def mapping(facts: ReportFacts) -> Chapter:
    """(12) The rows as tables, one for each scheme."""
    found = claims(facts)
    blocks: list[Block] = []
    for scheme in dict.fromkeys(claim.scheme for claim in found):
        rows = [c for c in found if c.scheme == scheme]
        anchor, heading = _HEADINGS[scheme]
        blocks += [
            Heading(text=heading, anchor=anchor),
            Table(
                caption=f"{scheme}. Summary of public guidance, not legal advice",
                head=("Asked", "What was done", "Evidence", "What remains"),
                rows=tuple((c.hazard, c.answer, Evidence(links=c.evidence), c.residual) for c in rows),
                layout="claims",
            ),
        ]
    if facts.campaign is None:
        blocks.append(
            Paragraph(
                text="NIST SP 800-226 evaluates claims of differential privacy. None is made here, so only the last of "
                "its hazards applies.",
                quiet=True,
            )
        )
    return Chapter(number=12, anchor="mapping", title="What regulators ask for, row by row", blocks=tuple(blocks))


# WP216


def _wp216(facts: ReportFacts) -> Iterator[Claim]:
    audit = facts.audit
    measured = audit is not None and bool(audit.endpoints)
    yield Claim(
        scheme=_WP216,
        hazard="Singling out",
        answer=_singling_out(audit) if audit and measured else "Not tested: no attack gave a usable result.",
        evidence=_cite(facts, ("attacks", "Attacks"), ("near-copies", "Near copies"), files=(AUDIT_RESULT,)),
        residual=_power_residual(audit) if audit and measured else "Everything.",
    )
    yield Claim(
        scheme=_WP216,
        hazard="Linkability",
        answer="Not tested: no attack links one patient across two draws, two releases or another data set.",
        evidence=_cite(facts, ("not-tested", "Not tested")),
        residual="Whoever holds a patient's scan can compare it with whatever is released; singling out measures only "
        "that one comparison.",
    )
    inference = audit.inference if audit else None
    yield Claim(
        scheme=_WP216,
        hazard="Inference",
        answer=(
            f"Tested for one question: {inference.question} With {100 * inference.upper.confidence:g} % confidence, "
            f"having been used adds at most {100 * inference.upper.value:.1f} points of right answers."
            if inference
            else "Not tested: no attribute was inferred."
        ),
        evidence=_cite(facts, ("inference", "Inference") if inference else ("not-tested", "Not tested")),
        residual="Other attributes. Facts that hold for everybody can be inferred about anybody, used or not.",
    )


def _singling_out(audit: AuditResult) -> str:
    worst = worst_auc(audit)
    if worst is None:
        return "Not tested."
    copied = max((e.copies_lower for e in audit.endpoints), key=lambda bound: bound.value)
    shown = (
        "No patient stands out as a copy"
        if copied.value <= 0
        else f"With {100 * copied.confidence:g} % confidence at least {share_text(copied.value)} stand out as copies"
    )
    found, copies = (
        max(b) for b in zip(*((e.tpr_upper.value, e.copies_upper.value) for e in audit.endpoints), strict=True)
    )
    return (
        f"With {100 * audit.confidence:g} % confidence of each number by itself: members found at "
        f"{share_text(audit.false_positive_rate)} wrongly accused, at most {share_text(found)}; AUC at most "
        f"{worst.auc_upper.value:.3f}; at most {share_text(copies)} copied, which counts only copies that score above "
        f"the threshold. {shown}."
    )


def _power_residual(audit: AuditResult) -> str:
    smallest = audit.smallest_detectable_copies
    if smallest is None or smallest >= 1:
        return "The audit could not have seen copies of any share."
    return f"Copies of fewer than {share_text(smallest)} of the patients may not be seen; attacks not tested."


# NIST SP 800-226


def _nist(facts: ReportFacts) -> Iterator[Claim]:
    if facts.campaign is not None:
        yield from _nist_claim(facts, facts.campaign)
        yield from _nist_machine(facts)
    attacks = ", ".join(attack_title(name).lower() for name in carried_out(facts))
    yield Claim(
        scheme=_NIST,
        hazard="“Synthetic, therefore private”",
        answer=f"Not assumed. Attacked: {attacks}." if attacks else "Not assumed, but no attack gave a usable result.",
        evidence=_cite(facts, ("attacks", "Attacks"), ("not-tested", "Not tested")),
        residual="Attacks that were not tested.",
    )


def _nist_claim(facts: ReportFacts, campaign: CampaignFacts) -> Iterator[Claim]:
    """Hazards of what is claimed."""
    plan, study, largest = campaign.plan, campaign.study, largest_epsilon(campaign)
    weak = largest == "infinite" or largest > WEAK_PROOF
    failures = plan.delta * study.privacy.reference_patients
    yield _claim(
        facts,
        "Epsilon too large",
        f"Largest epsilon of a patient {epsilon_text(largest)}; the study's cap is {study.privacy.epsilon_cap:g} and "
        "the gate refuses above it.",
        "epsilon",
        "Large: the proof alone would not stop every attacker." if weak else "None known beyond the stated value.",
        DECISION,
    )
    yield _claim(
        facts,
        "Delta not tiny",
        f"Delta {plan.delta:g}: over {study.privacy.reference_patients} patients of a hospital, the planned size, "
        f"at most {failures:.2g} guarantees are expected to fail.",
        "privacy",
        "It is stated for each patient, not for a whole hospital at once.",
    )
    yield _claim(
        facts,
        "A unit smaller than the person",
        f"The unit is one {plan.mechanism.unit.value} with all scans.",
        "privacy",
        "Somebody known at two hospitals, or under two names, counts as two; their epsilons add up.",
    )
    yield _claim(
        facts,
        "Unclear neighbouring relation",
        "Adding or removing one patient, for every mechanism in the account.",
        "privacy",
        "Replacing a patient counts as two changes.",
    )
    yield _claim(
        facts,
        "Unbounded contribution",
        f"One patient's whole gradient is clipped to {plan.clip_norm:g}; the sum is divided by a public constant.",
        "privacy",
        "None known.",
    )
    yield _claim(
        facts,
        "Clipping or domain taken from the data",
        "Clip norm, grid and grey-value rule are settings of the study; no value comes from more than one scan. The "
        "audit's bins were fixed before any score existed.",
        "preparation",
        "Percentiles, where used, come from the very scan that they scale.",
        AUDIT_PLAN,
    )


def _nist_machine(facts: ReportFacts) -> Iterator[Claim]:
    """Hazards of how it was done."""
    yield _claim(
        facts,
        "Tuning and validation outside the budget",
        "Audit and utility answers are charged to the patients asked. Settings were fixed in the study beforehand.",
        "audit-cost",
        "Choices that people made by looking at these patients before are in no ledger.",
    )
    yield _claim(
        facts,
        "Composition over repeated releases",
        "Each hospital's ledger composes everything done to a patient in this study, restarts included; the gate "
        "recomputes it from the mechanisms stated.",
        "epsilon",
        "Other studies' spending is in the hospitals' ledgers and not in this report.",
        EVIDENCE,
    )
    noisy = facts.campaign is not None and facts.campaign.plan.mechanism.noise_multiplier > 0
    yield _claim(
        facts,
        "Floating-point noise",
        "Noised sums are rounded to a public grid; what remains is bounded in chapter 4."
        if noisy
        else "Training had no noise, so there is nothing to attack and nothing to protect.",
        "privacy",
        "Elementary functions of a graphics card.",
    )
    yield _claim(
        facts,
        "Timing and other side channels",
        "Nothing was done against them.",
        "not-covered",
        "Running times, message times and memory may tell something about the data.",
    )
    yield _claim(
        facts,
        "Wrong trust model",
        "Noise is added in each hospital before anything leaves it; no hospital trusts the coordinator with scans, "
        "critics or exact counts.",
        "privacy",
        "A hospital that lies about its noise, its hold-out or its ledger cannot be found out from outside.",
    )


def _claim(facts: ReportFacts, hazard: str, answer: str, anchor: str, residual: str, *files: str) -> Claim:
    name = {
        "epsilon": "Epsilon of every hospital",
        "privacy": "Differential privacy",
        "preparation": "Preparation",
        "audit-cost": "Cost of the audit",
        "not-covered": "Not covered",
    }[anchor]
    evidence = _cite(facts, (anchor, name), files=files)
    return Claim(scheme=_NIST, hazard=hazard, answer=answer, evidence=evidence, residual=residual)


# ISO/IEC 27559 and data protection law


def _iso(facts: ReportFacts) -> Iterator[Claim]:
    rows = (
        ("Context assessment", "Threats and recipients.", (("purpose", "Purpose"), ("threats", "Threat models")),
         "Recipients are named by whoever signs."),
        ("Data assessment", "Hospitals, counts, preparation; attack modelling, worst hospital beside the mean.",
         (("sites", "Hospitals"), ("attacks", "Attacks")), "Direct identifiers in file headers are no part of it."),
        ("Identifiability assessment", "Adversarial testing with controls and power.",
         (("attacks", "Attacks"), ("controls", "Controls"), ("power", "Power")), "Attacks not tested."),
        ("Mitigation", "Differential privacy." if facts.campaign else "None known to this software.",
         (("privacy", "Differential privacy"),), "What it does not cover."),
        ("Governance", "Decision, expiry, reasons to audit again, signatures.",
         (("decision", "Decision"), ("sign-off", "Signatures")), "What recipients do with what they were given."),
    )  # fmt: skip
    for hazard, answer, links, residual in rows:
        yield Claim(scheme=_ISO, hazard=hazard, answer=answer, evidence=_cite(facts, *links), residual=residual)


def _gdpr(facts: ReportFacts) -> Iterator[Claim]:
    yield Claim(
        scheme=_LAW,
        hazard="Is the model anonymous?",
        answer="Judged case by case: neither extracting personal data from a model nor obtaining them by queries may "
        "be likely, by all means reasonably likely to be used. This report gives test evidence about the weights and "
        "the volumes. It does not make the judgement.",
        evidence=_cite(facts, ("threats", "Threat models"), ("attacks", "Attacks"), ("power", "Power")),
        residual="The judgement itself, the impact assessment and the officer's advice: chapter 14.",
    )


def _cite(facts: ReportFacts, *anchors: tuple[str, str], files: tuple[str, ...] = ()) -> tuple[Link | Cited, ...]:
    """Links to anchors, and to those files that are really there."""
    return (
        *(Link(anchor=anchor, text=text) for anchor, text in anchors),
        *(Cited(name=name) for name in files if name in facts.records),
    )
