"""The verdict's comparisons as tables: every bound of every attack, and of what stands beside them, and its limit."""

from __future__ import annotations

from collections.abc import Iterator

from common.measure.audit_plan import Endpoint
from common.settings.study import ReleaseSettings
from server.audit.document import Cell, Mark, Table
from server.audit.facts import ReportFacts
from server.audit.numerals import auc_text, rate_text, share_text
from server.audit.result import AuditResult, EndpointResult, MechanismAudit, MechanismVerdict
from server.audit.threats import attack_of, attack_title

_HEAD = ("Quantity", "Estimate (interval)", "Bound", "Limit", "Kept")
_NUMBERS = frozenset({1, 2, 3})


def limit_tables(facts: ReportFacts) -> tuple[Table, ...]:
    """One table for each attack, and one for what else has a limit: what was compared with which limit."""
    audit = facts.audit
    if audit is None or not audit.endpoints:
        return ()
    release = facts.campaign.study.release if facts.campaign else ReleaseSettings()
    attacks = tuple(_limits(audit, endpoint, release.max_copied_share) for endpoint in audit.endpoints)
    beside = tuple(_beside(audit))
    if not beside:
        return attacks
    caption = "Beside the attacks. What else a release was held against, where it was measured"
    return (*attacks, Table(caption=caption, head=_HEAD, rows=beside, numbers=_NUMBERS))


def lift_text(lift: float) -> str:
    """A difference of two rates, in points of per cent with its sign."""
    return f"{100 * lift:+.1f}"


def kept(within: bool) -> Mark:
    """Whether a bound lies within its limit."""
    return Mark(text="yes" if within else "no", good=within)


def _limits(audit: AuditResult, endpoint: EndpointResult, max_copied_share: float) -> Table:
    """Every compared quantity of one attack. The gate's own comparison, repeated for the reader."""
    limits = audit.thresholds
    worst = max(endpoint.sites, key=lambda s: s.upper.value, default=None)
    rows: list[tuple[Cell, ...]] = [
        _auc_row("AUC, all hospitals", auc_text(endpoint.auc), endpoint.auc_upper.value, limits.max_auc)
    ]
    if worst is not None:
        name = f"AUC, worst hospital ({worst.site})"
        rows.append(_auc_row(name, auc_text(worst.auc), worst.upper.value, limits.max_auc_site))
    rows += [
        (
            f"Members found at {share_text(audit.false_positive_rate)} wrongly accused",
            rate_text(endpoint.tpr),
            f"≤ {share_text(endpoint.tpr_upper.value)}",
            share_text(limits.max_tpr),
            kept(endpoint.tpr_upper.value <= limits.max_tpr),
        ),
        (
            "Members that stand out as copies",
            "–",
            f"≥ {share_text(endpoint.copies_lower.value)}" if endpoint.copies_lower.value > 0 else "none shown",
            "none",
            kept(endpoint.copies_lower.value <= 0),
        ),
    ]
    if endpoint.name is Endpoint.NEAR_COPY:
        rows.append(
            (
                "Members that may be copies above the threshold",
                "–",
                f"≤ {share_text(endpoint.copies_upper.value)}",
                share_text(max_copied_share),
                kept(endpoint.copies_upper.value <= max_copied_share),
            )
        )
    rows.append(
        (
            "Smallest visible share of copies",
            f"planned {share_text(endpoint.power.planned)}",
            f"achieved {share_text(endpoint.power.achieved)}",
            share_text(limits.max_detectable_copies),
            kept(endpoint.power.smallest_copies <= limits.max_detectable_copies),
        )
    )
    how = attack_of(endpoint.name).how
    return Table(caption=f"{attack_title(endpoint.name)}. {how}", head=_HEAD, rows=tuple(rows), numbers=_NUMBERS)


def _auc_row(name: str, estimate: str, upper: float, limit: float) -> tuple[Cell, ...]:
    return name, estimate, f"≤ {upper:.3f}", f"{limit:g}", kept(upper <= limit)


def _beside(audit: AuditResult) -> Iterator[tuple[Cell, ...]]:
    """What was measured without being an attack's score."""
    limits = audit.thresholds
    if audit.inference is not None:
        lift, upper = audit.inference.lift, audit.inference.upper.value
        yield (
            "Attribute inference: lift in points",
            f"{lift_text(lift.estimate)} ({lift_text(lift.low)} to {lift_text(lift.high)})",
            f"≤ {lift_text(upper)}",
            f"{100 * limits.max_inference_lift:g}",
            kept(upper <= limits.max_inference_lift),
        )
    if audit.blind is not None:
        auc, most = audit.blind.auc, limits.max_blind_auc
        yield (
            "Blind baseline: AUC without the generator",
            auc_text(auc),
            f"{auc.low:.3f} to {auc.high:.3f}",
            f"{1 - most:.3g} to {most:.3g}",
            kept(audit.blind.passed),
        )
    if audit.mechanism is not None:
        yield _mechanism(audit.mechanism)


def _mechanism(found: MechanismAudit) -> tuple[Cell, ...]:
    """The canaries' verdict; an uninformative one keeps nothing and breaks nothing."""
    unclear = found.verdict is MechanismVerdict.UNINFORMATIVE
    return (
        "Mechanism: epsilon of training, by canaries",
        f"{found.correct} of {found.guesses} guesses right",
        found.verdict.value,
        f"claimed {found.claimed_epsilon:.2f}",
        "cannot be told" if unclear else kept(found.verdict is MechanismVerdict.CONSISTENT),
    )
