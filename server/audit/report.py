"""The audit report: one HTML file without scripts or outside requests, and a short text for terminals.

`render_report` and `render_summary` only show what `ReportFacts` holds; nothing here decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from common.evidence.predicate import CohortEpsilon, utc_text
from server.audit import assurance_chapters, attack_chapters, campaign_chapters, decision_chapters, wording
from server.audit.course_chapter import course_chapters
from server.audit.document import Chapter, Table
from server.audit.facts import (
    AuditedScans,
    CampaignFacts,
    Gallery,
    ReportFacts,
    RoundCourse,
)
from server.audit.limit_tables import limit_tables
from server.audit.mapping import mapping
from server.audit.markdown import chapter_lines, table_lines
from server.audit.numerals import dice_text, epsilon_text, share_text

__all__ = [
    "AuditedScans",
    "CampaignFacts",
    "Gallery",
    "ReportFacts",
    "RoundCourse",
    "chapters",
    "render_markdown",
    "render_report",
    "render_summary",
]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A key figure of the first screen. good: None when nothing is compared."""

    label: str
    value: str
    note: str
    good: bool | None


def chapters(facts: ReportFacts) -> tuple[Chapter, ...]:
    """The fourteen points that a data-protection officer signs, in their order; the course of training after them."""
    return (
        campaign_chapters.subject(facts),
        campaign_chapters.purpose(facts),
        campaign_chapters.sites(facts),
        campaign_chapters.privacy(facts),
        attack_chapters.threats(facts),
        attack_chapters.attacks(facts),
        attack_chapters.near_copies(facts),
        assurance_chapters.mechanism(facts),
        assurance_chapters.controls(facts),
        assurance_chapters.power(facts),
        assurance_chapters.audit_cost(facts),
        mapping(facts),
        decision_chapters.decision(facts),
        decision_chapters.sign_off(facts),
        *course_chapters(facts.campaign),
    )


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
    # The SVG is our own; everything in it that came from outside was escaped where it was drawn.
    environment.filters |= {"when": utc_text, "drawn": Markup}
    return environment.get_template("report.html").render(
        facts=facts,
        decision=facts.campaign.decision if facts.campaign else None,
        headline=wording.headline(facts),
        reasons=wording.reasons(facts),
        statements=wording.statements(facts),
        tiles=tiles(facts),
        chapters=chapters(facts),
    )


def render_markdown(facts: ReportFacts) -> str:
    """The whole report in Markdown: the page's words and tables, without its pictures."""
    headline = wording.headline(facts)
    lines = [*_warnings(facts), f"# {headline.word}: {facts.title}", "", headline.sentence, ""]
    lines += [*(f"- {reason}" for reason in wording.reasons(facts)), "", "## In plain words", ""]
    for statement in wording.statements(facts):
        lines += [f"**{statement.topic}.** {statement.text}", ""]
    for chapter in chapters(facts):
        lines += chapter_lines(chapter)
    lines += [f"Made by Consilium on {utc_text(facts.made_at)}, {facts.reference}.", ""]
    return "\n".join(lines)


def render_summary(facts: ReportFacts) -> str:
    """A short Markdown text for terminals: verdict, reasons, epsilon by site, audit, utility, where to look on."""
    headline, campaign = wording.headline(facts), facts.campaign
    lines = [*_warnings(facts), f"# {headline.word}: {facts.title}", "", headline.sentence, ""]
    if wording.reasons(facts):
        lines += ["## Reasons", "", *(f"- {reason}" for reason in wording.reasons(facts)), ""]
    if campaign is not None:
        lines += ["## Epsilon by site", "", *table_lines(_epsilon_table(campaign)), ""]
    if facts.audit is not None and facts.audit.endpoints:
        lines += [f"## Audit: {facts.audit.verdict.value.upper()}", ""]
        for table in limit_tables(facts):
            lines += [table.caption.split(".")[0], "", *table_lines(table), ""]
    if campaign is not None and campaign.utility is not None and campaign.utility.rows:
        rows = tuple(
            (row.source.value, *map(dice_text, row.dice), dice_text(row.mean)) for row in campaign.utility.rows
        )
        table = Table(caption="Dice", head=("trained on", *campaign.utility.labels, "mean"), rows=rows)
        lines += ["## Dice on held-out patients", "", *table_lines(table), ""]
    lines += [f"Of {facts.reference}, {utc_text(facts.made_at)}. All of it: report.md.", ""]
    return "\n".join(lines)


def tiles(facts: ReportFacts) -> tuple[Tile, ...]:
    """The key figures of the first screen."""
    return (_epsilon_tile(facts.campaign), *_audit_tiles(facts))


def _warnings(facts: ReportFacts) -> list[str]:
    """What nobody may miss, before anything else."""
    if facts.campaign is None:
        return []
    lines = []
    if facts.campaign.decision.coarser:
        lines += [f"> **Coarser than the default thresholds:** {'; '.join(facts.campaign.decision.coarser)}.", ""]
    if facts.simulated:
        lines += [f"> **Simulated run** (seed {facts.campaign.seed}): it protects no real patient.", ""]
    return lines


def _epsilon_tile(campaign: CampaignFacts | None) -> Tile:
    label = "Largest epsilon of a patient"
    if campaign is None:
        return Tile(label=label, value="none", note="no differential privacy is claimed", good=None)
    epsilon, cap = wording.largest_epsilon(campaign), campaign.study.privacy.epsilon_cap
    return Tile(
        label=label,
        value=epsilon_text(epsilon),
        note=f"cap {cap:g}, at delta {campaign.study.privacy.delta:g}",
        good=epsilon != "infinite" and epsilon <= cap,
    )


def _audit_tiles(facts: ReportFacts) -> tuple[Tile, ...]:
    audit = facts.audit
    auc, tpr = (wording.worst_auc(audit), wording.worst_tpr(audit)) if audit else (None, None)
    if audit is None or auc is None or tpr is None:
        return (Tile(label="Audit", value="none", note="nothing was measured", good=False),)
    copies, limits = audit.smallest_detectable_copies, audit.thresholds
    return (
        Tile(
            label="Used and held-out told apart (AUC)",
            value=f"≤ {auc.auc_upper.value:.3f}",
            note=f"limit {limits.max_auc:g}; guessing 0.5",
            good=auc.auc_upper.value <= limits.max_auc,
        ),
        Tile(
            label=f"Found at {share_text(audit.false_positive_rate)} wrongly accused",
            value=f"≤ {share_text(tpr.tpr_upper.value)}",
            note=f"limit {share_text(limits.max_tpr)}",
            good=tpr.tpr_upper.value <= limits.max_tpr,
        ),
        Tile(
            label="Smallest visible share of copies",
            value="none" if copies is None or copies >= 1 else share_text(copies),
            note=f"limit {share_text(limits.max_detectable_copies)}, with 90 % power",
            good=copies is not None and copies <= limits.max_detectable_copies,
        ),
    )


def _epsilon_table(campaign: CampaignFacts) -> Table:
    rows = []
    for site, stated in sorted(campaign.decision.sites.items()):
        spent: CohortEpsilon = stated.members
        rows.append(
            (
                site,
                f"{epsilon_text(spent.epsilon)} ({spent.accountant})",
                f"{epsilon_text(spent.lower)} to {epsilon_text(spent.upper)}",
                epsilon_text(spent.second_opinion),
                epsilon_text(stated.nonmembers.epsilon),
                f"{spent.delta:g}",
            )
        )
    head = ("site", "members", "lower to upper", "second accountant", "held-out", "delta")
    return Table(caption="Epsilon by site", head=head, rows=tuple(rows))
