"""The audit report: one HTML file without scripts or outside requests, and a short text for terminals.

`render_report` and `render_summary` only show what `ReportFacts` holds; nothing here decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from common.evidence.predicate import CohortEpsilon, utc_text
from common.measure.intervals import Interval
from common.settings.study import AuditSettings, ReleaseSettings
from server.audit import figures, wording
from server.audit.facts import ReportFacts, RoundCourse
from server.audit.result import AuditResult, EndpointResult
from server.audit.slices import LABEL_COLOURS, ZOOM, planes_png

__all__ = ["ReportFacts", "RoundCourse", "render_report", "render_summary"]

GALLERY = 6  # cases of each kind


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A key figure of the first screen. good: None when nothing is compared."""

    label: str
    value: str
    note: str
    good: bool | None


@dataclass(frozen=True, kw_only=True)
class LimitRow:
    """One quantity of one attack against its limit. The verdict's own comparison, repeated for the reader."""

    quantity: str
    estimate: str
    bound: str
    limit: str
    kept: bool


def render_report(facts: ReportFacts) -> str:
    """The self-contained HTML document; the same facts give the same text."""
    environment = Environment(
        loader=PackageLoader("server", "audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "epsilon": wording.epsilon_text,
        "auc": _auc,
        "rate": _rate,
        "dice": wording.dice_text,
        "source": wording.source_text,
        "attack": figures.endpoint_title,
        "when": utc_text,
    }
    return environment.get_template("report.html").render(
        facts=facts,
        study=facts.study,
        decision=facts.decision,
        audit=facts.audit,
        utility=facts.utility,
        headline=wording.headline(facts),
        statements=wording.statements(facts),
        warm_up=wording.warm_up_text(facts),
        guarantee=wording.guarantee(facts),
        tiles=tiles(facts),
        tpr_limit=lambda spent: _share(wording.tpr_limit(spent, facts.study.audit.false_positive_rate)),
        limit_rows=limit_rows,
        not_covered=wording.not_covered(facts),
        not_tested=wording.not_tested(facts),
        settings=_settings(facts),
        **_drawings(facts),
    )


def render_summary(facts: ReportFacts) -> str:
    """A short Markdown text for terminals: verdict, reasons, epsilon by site, audit, utility, where to look on."""
    headline = wording.headline(facts)
    lines = [f"# {headline.word}: {facts.study.study}", "", headline.sentence, ""]
    if facts.decision.coarser:
        coarser = "; ".join(facts.decision.coarser)
        lines[:0] = [f"> **Coarser than the default thresholds:** {coarser}.", ""]
    if facts.decision.simulated:
        lines += [f"> **Simulated run** (seed {facts.seed}): it protects no real patient.", ""]
    if facts.decision.reasons:
        lines += ["## Reasons", "", *(f"- {reason}" for reason in facts.decision.reasons), ""]
    lines += ["## Epsilon by site", "", *_markdown_table(_epsilon_rows(facts)), ""]
    if facts.audit is not None and facts.audit.endpoints:
        lines += [f"## Audit: {facts.audit.verdict.value.upper()}", "", *_markdown_table(_audit_rows(facts.audit)), ""]
    if facts.utility is not None and facts.utility.rows:
        rows = [("trained on", *facts.utility.labels, "mean")]
        rows += [
            (row.source.value, *map(wording.dice_text, row.dice), wording.dice_text(row.mean))
            for row in facts.utility.rows
        ]
        lines += ["## Dice on held-out patients", "", *_markdown_table(rows), ""]
    lines += [f"Decision {facts.decision.id}, {utc_text(facts.made_at)}.", ""]
    return "\n".join(lines)


def tiles(facts: ReportFacts) -> tuple[Tile, ...]:
    """The key figures of the first screen."""
    epsilon = wording.largest_epsilon(facts)
    cap = facts.study.privacy.epsilon_cap
    first = Tile(
        label="Largest epsilon of a patient",
        value=wording.epsilon_text(epsilon),
        note=f"cap {cap:g}, at delta {facts.study.privacy.delta:g}",
        good=epsilon != "infinite" and epsilon <= cap,
    )
    audit = facts.audit
    auc, tpr = (wording.worst_auc(audit), wording.worst_tpr(audit)) if audit else (None, None)
    if audit is None or auc is None or tpr is None:
        return (first, Tile(label="Audit", value="none", note="nothing was measured", good=False))
    copies, limits = audit.smallest_detectable_copies, audit.thresholds
    return (
        first,
        Tile(
            label="Used and held-out told apart (AUC)",
            value=f"≤ {auc.auc_upper.value:.3f}",
            note=f"limit {limits.max_auc:g}; guessing 0.5",
            good=auc.auc_upper.value <= limits.max_auc,
        ),
        Tile(
            label=f"Found at {_share(audit.false_positive_rate)} wrongly accused",
            value=f"≤ {_share(tpr.tpr_upper.value)}",
            note=f"limit {_share(limits.max_tpr)}",
            good=tpr.tpr_upper.value <= limits.max_tpr,
        ),
        Tile(
            label="Smallest visible share of copies",
            value="none" if copies is None or copies >= 1 else _share(copies),
            note=f"limit {_share(limits.max_detectable_copies)}, with 90 % power",
            good=copies is not None and copies <= limits.max_detectable_copies,
        ),
    )


def limit_rows(audit: AuditResult, endpoint: EndpointResult) -> tuple[LimitRow, ...]:
    """Every compared quantity of one attack."""
    limits = audit.thresholds
    worst = max(endpoint.sites, key=lambda s: s.upper.value, default=None)
    rows = [
        LimitRow(
            quantity="AUC, all sites",
            estimate=_auc(endpoint.auc),
            bound=f"≤ {endpoint.auc_upper.value:.3f}",
            limit=f"{limits.max_auc:g}",
            kept=endpoint.auc_upper.value <= limits.max_auc,
        )
    ]
    if worst is not None:
        rows.append(
            LimitRow(
                quantity=f"AUC, worst site ({worst.site})",
                estimate=_auc(worst.auc),
                bound=f"≤ {worst.upper.value:.3f}",
                limit=f"{limits.max_auc_site:g}",
                kept=worst.upper.value <= limits.max_auc_site,
            )
        )
    return (
        *rows,
        LimitRow(
            quantity=f"Members found at {_share(audit.false_positive_rate)} false positives",
            estimate=_rate(endpoint.tpr),
            bound=f"≤ {_share(endpoint.tpr_upper.value)}",
            limit=_share(limits.max_tpr),
            kept=endpoint.tpr_upper.value <= limits.max_tpr,
        ),
        LimitRow(
            quantity="Members that stand out as copies",
            estimate="–",
            bound=f"≥ {_share(endpoint.copies_lower.value)}" if endpoint.copies_lower.value > 0 else "none shown",
            limit="none",
            kept=endpoint.copies_lower.value <= 0,
        ),
        LimitRow(
            quantity="Smallest visible share of copies",
            estimate=f"planned {_share(endpoint.power.planned)}",
            bound=f"achieved {_share(endpoint.power.achieved)}",
            limit=_share(limits.max_detectable_copies),
            kept=endpoint.power.smallest_copies <= limits.max_detectable_copies,
        ),
    )


def _drawings(facts: ReportFacts) -> dict[str, object]:
    """Charts and slices. The SVG is our own; everything in it that came from outside was escaped there."""
    audit = facts.audit
    endpoints = audit.endpoints if audit else ()
    drawn: dict[str, object] = {
        "course": None,
        "roc": None,
        "histograms": None,
        "zoom": ZOOM,
        "colours": [f"rgb{colour}" for colour in LABEL_COLOURS],
        "label_names": [facts.study.labels[value] for value in sorted(facts.study.labels)],
        "synthetic": [planes_png(pair) for pair in facts.synthetic[:GALLERY]],
        "phantom": [planes_png(pair) for pair in facts.phantom[:GALLERY]],
    }
    if facts.rounds:
        target = facts.study.privacy.target_epsilon
        drawn["course"] = Markup(figures.course_figure(facts.rounds, target_epsilon=target))  # noqa: S704
    if audit is not None and endpoints:
        rate, limit = audit.false_positive_rate, audit.thresholds.max_tpr
        drawn["roc"] = Markup(figures.roc_figure(endpoints, false_positive_rate=rate, max_tpr=limit))  # noqa: S704
        drawn["histograms"] = Markup(figures.histogram_figure(endpoints))  # noqa: S704
    return drawn


def _settings(facts: ReportFacts) -> tuple[tuple[str, str, str], ...]:
    """Thresholds of this study beside the defaults."""
    study, usual_release, usual_audit = facts.study, ReleaseSettings(), AuditSettings()
    names = ("max_auc", "max_auc_site", "max_tpr", "max_detectable_copies")
    rows = [(f"release.{n}", f"{getattr(study.release, n):g}", f"{getattr(usual_release, n):g}") for n in names]
    audited = ("false_positive_rate", "confidence", "planted_fraction", "epsilon_per_answer", "holdout_fraction")
    rows += [(f"audit.{n}", f"{getattr(study.audit, n):g}", f"{getattr(usual_audit, n):g}") for n in audited]
    return tuple(rows)


def _epsilon_rows(facts: ReportFacts) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("site", "members", "lower to upper", "second accountant", "held-out", "delta")]
    for site, stated in sorted(facts.decision.sites.items()):
        spent: CohortEpsilon = stated.members
        rows.append(
            (
                site,
                f"{wording.epsilon_text(spent.epsilon)} ({spent.accountant})",
                f"{wording.epsilon_text(spent.lower)} to {wording.epsilon_text(spent.upper)}",
                wording.epsilon_text(spent.second_opinion),
                wording.epsilon_text(stated.nonmembers.epsilon),
                f"{spent.delta:g}",
            )
        )
    return rows


def _audit_rows(audit: AuditResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("attack", "quantity", "estimate", "bound", "limit", "kept")]
    for endpoint in audit.endpoints:
        rows += [
            (figures.endpoint_title(endpoint.name), r.quantity, r.estimate, r.bound, r.limit, "yes" if r.kept else "NO")
            for r in limit_rows(audit, endpoint)
        ]
    return rows


def _markdown_table(rows: list[tuple[str, ...]]) -> list[str]:
    """Header, rule and rows, columns padded so that it also reads well unrendered."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return [text[0], rule, *text[1:]]


def _auc(interval: Interval) -> str:
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _rate(interval: Interval) -> str:
    return f"{_share(interval.estimate)} ({_share(interval.low)} to {_share(interval.high)})"


def _share(value: float) -> str:
    """A rate in per cent, clipped for the reader to [0, 100]: noise may carry an estimate outside."""
    percent = 100 * min(max(value, 0.0), 1.0)
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.1f} %".replace(".0 ", " ") if 0 < percent < 10 else f"{percent:.0f} %"
