"""Chapters 8 to 11: whether the noise works, whether a leak could have been seen, and what the audit itself cost."""

from __future__ import annotations

from server.audit.document import Block, Cell, Chapter, Mark, Paragraph, Table
from server.audit.facts import ReportFacts
from server.audit.numerals import auc_text, rate_text, share_text
from server.audit.result import AuditResult, EndpointResult, MechanismVerdict
from server.audit.threats import attack_title
from server.audit.wording import cost_text, mechanism_text


def mechanism(facts: ReportFacts) -> Chapter:
    """(8) Canaries: the number, what they could have shown, what they show."""
    title = "Mechanism audit: does the noise work?"
    found = facts.audit.mechanism if facts.audit else None
    if found is None:
        nothing = Paragraph(
            text="Not carried out: no canary was planted in the training, so nothing here tests the noise itself."
        )
        return Chapter(number=8, anchor="mechanism", title=title, blocks=(nothing,))
    meaning = mechanism_text(found)
    blocks: list[Block] = [
        Paragraph(topic=found.verdict.value.upper(), text=f"{meaning[0].upper()}{meaning[1:]}."),
        Paragraph(
            text=f"{found.canaries} canaries over all hospitals, each trained on or not by a fair coin. Of "
            f"{found.guesses} guesses, {found.correct} were right. Claimed for training: epsilon "
            f"{found.claimed_epsilon:.2f} at delta {found.delta:g}. Without any noise the same canaries would have "
            f"shown at least {found.without_noise:.2f}."
        ),
        *(Paragraph(text=reason) for reason in found.reasons if found.verdict is MechanismVerdict.VIOLATION),
        Table(
            caption="Lower bounds on the true epsilon, and the most that so many canaries could have shown",
            head=("Method", "Assuming", "Epsilon at least", "Ceiling", "Confidence", "Against the claim"),
            rows=tuple(
                (
                    bound.method,
                    bound.assumption or "nothing further",
                    f"{bound.value.value:.2f}",
                    f"{bound.ceiling:.2f}",
                    f"{100 * bound.value.confidence:g} %",
                    Mark(
                        text="above" if bound.value.value > found.claimed_epsilon else "not above",
                        good=bound.value.value <= found.claimed_epsilon,
                    ),
                )
                for bound in found.bounds
            ),
            numbers=frozenset({2, 3, 4}),
        ),
    ]
    if found.verdict is not MechanismVerdict.VIOLATION:
        blocks.append(Paragraph(text="No violation found is not the same as none being there.", quiet=True))
    return Chapter(number=8, anchor="mechanism", title=title, blocks=tuple(blocks))


def controls(facts: ReportFacts) -> Chapter:
    """(9) Positive, negative and null controls."""
    title, audit = "Controls: could the audit have seen a leak?", facts.audit
    if audit is None or not audit.endpoints:
        nothing = Paragraph(text="No control was run, so nothing in this report shows safety.")
        return Chapter(number=9, anchor="controls", title=title, blocks=(nothing,))
    rows = [row for endpoint in audit.endpoints for row in _controls_of(endpoint)]
    if audit.blind is not None:
        shown = "groups alike" if audit.blind.passed else "groups differ, or too little data"
        rows.append(
            (
                "None: a score that ignores the generator",
                "Blind baseline: used patients against those held out, AUC; a difference is none of the generator's, "
                f"and must be shown to lie within {audit.thresholds.max_blind_auc:g}",
                auc_text(audit.blind.auc),
                Mark(text=shown, good=audit.blind.passed),
            )
        )
    if audit.critic is not None:
        critic = audit.critic
        rows.append(
            (
                "Hospitals' own critics",
                f"Share of {critic.sites} hospitals whose own critic gives their used patients away: {critic.found} "
                f"said yes, each by a randomised answer at epsilon {critic.epsilon:g}",
                rate_text(critic.share),
                "for information: with noise, a critic need not tell",
            )
        )
    table = Table(
        caption="An audit that finds nothing means something only when it finds what was planted, and finds nothing "
        "where there is nothing",
        head=("Attack", "Control", "Found", "As it must be"),
        rows=tuple(rows),
        numbers=frozenset({2}),
    )
    negative = Paragraph(
        text="The patients held out are the negative control of every attack: their scores alone set how many people "
        "are wrongly accused.",
        quiet=True,
    )
    return Chapter(number=9, anchor="controls", title=title, blocks=(table, negative))


def power(facts: ReportFacts) -> Chapter:
    """(10) The smallest leak that would have been seen."""
    title, audit = "Power: the smallest leak that could be seen", facts.audit
    if audit is None or not audit.endpoints:
        nothing = Paragraph(text="Nothing was measured, so no leak of any size could have been seen.")
        return Chapter(number=10, anchor="power", title=title, blocks=(nothing,))
    limit = audit.thresholds.max_detectable_copies
    rows: list[tuple[Cell, ...]] = []
    for e in audit.endpoints:
        kept = e.power.smallest_copies <= limit
        rows.append(
            (
                attack_title(e.name),
                f"{e.members} / {e.nonmembers}",
                _copies(e.power.planned),
                _copies(e.power.achieved),
                share_text(limit),
                Mark(text="small enough" if kept else "too large", good=kept),
            )
        )
    blocks = (
        Paragraph(text=_power_statement(audit)),
        Table(
            caption="Smallest share of copied patients seen with "
            f"{100 * audit.endpoints[0].power.probability:g} % probability. Planned: from public sizes, before any "
            "answer was opened. Achieved: with the noise that was met. The worse of the two counts",
            head=("Attack", "Used / held out", "Planned", "Achieved", "Limit", "Finding"),
            rows=tuple(rows),
            numbers=frozenset({1, 2, 3, 4}),
        ),
    )
    return Chapter(number=10, anchor="power", title=title, blocks=blocks)


def audit_cost(facts: ReportFacts) -> Chapter:
    """(11) What being audited cost the patients."""
    title, audit = "What the audit itself cost in privacy", facts.audit
    if audit is None:
        nothing = Paragraph(text="No audit, no cost.")
        return Chapter(number=11, anchor="audit-cost", title=title, blocks=(nothing,))
    rows = [
        ("Used patients", "answers of the audit", cost_text(audit.epsilon_members)),
        ("Patients held out", "answers of the audit, comparison and control", cost_text(audit.epsilon_nonmembers)),
    ]
    utility = facts.campaign.utility if facts.campaign else None
    if utility is not None:
        rows.append(("Patients held out", "answers about utility", cost_text(utility.epsilon_nonmembers)))
    where = (
        "Charged to each hospital's ledger and included in the epsilons of chapter 4."
        if facts.campaign
        else "Charged to no ledger: this audit ran outside of a campaign."
    )
    blocks = (
        Paragraph(text=f"Of one patient, by basic composition of pure epsilons. {where}"),
        Table(caption="Cost of this audit", head=("Who", "For", "Cost"), rows=tuple(rows), layout="narrow"),
    )
    return Chapter(number=11, anchor="audit-cost", title=title, blocks=blocks)


def _controls_of(e: EndpointResult) -> tuple[tuple[Cell, ...], ...]:
    return (
        (
            attack_title(e.name),
            "Null: used patients against other used patients, AUC; there is nothing to find",
            auc_text(e.null.auc),
            Mark(text="no difference" if e.null.passed else "a difference, or too little data", good=e.null.passed),
        ),
        (
            attack_title(e.name),
            f"Positive: {100 * e.planted.planted_fraction:g} % of the patients held out copied on purpose, share found",
            rate_text(e.planted.tpr),
            Mark(text="caught" if e.planted.detected else "missed", good=e.planted.detected),
        ),
    )


def _power_statement(audit: AuditResult) -> str:
    worst = audit.smallest_detectable_copies
    if worst is None or worst >= 1:
        return "With these patients and this noise no share of copied patients could have been seen."
    return (
        f"Had {share_text(worst)} of the used patients been copied, every attack would have noticed with "
        f"{100 * audit.endpoints[0].power.probability:g} % probability. Of a smaller share this audit may have seen "
        "nothing."
    )


def _copies(share: float) -> str:
    return "none visible" if share >= 1 else share_text(share)
