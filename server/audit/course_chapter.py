"""Chapter 15, where the course of training was followed: its points, the front, and how the round was chosen."""

from __future__ import annotations

from collections.abc import Iterator

from common.measure.course import pareto_front
from common.measure.fidelity.distances import FEWEST
from common.protocol.messages import FidelityMeasure
from server.audit.course_figures import EXACT_LABEL, points_figure
from server.audit.document import Block, Cell, Chapter, Drawing, Heading, Mark, Paragraph, Table
from server.audit.facts import CampaignFacts
from server.audit.numerals import auc_text, dice_text, epsilon_text
from server.course import Chosen, Course, CourseRow

_FIDELITY = {
    FidelityMeasure.FRECHET: "Fréchet distance",
    FidelityMeasure.KERNEL: "KID",
    FidelityMeasure.RECALL: "PRD F8 (recall)",
    FidelityMeasure.PRECISION: "PRD F1/8 (precision)",
    FidelityMeasure.SIMILARITY_REAL: "MS-SSIM among real",
    FidelityMeasure.SIMILARITY_SYNTHETIC: "MS-SSIM among synthetic",
    FidelityMeasure.INTENSITY: "Grey values (Wasserstein)",
    FidelityMeasure.SPECTRUM_DB: "Spectrum (dB)",
    FidelityMeasure.RADIOMICS: "Radiomics, largest KS",
    FidelityMeasure.RADIOMICS_DIFFERING: "Radiomics that differ, of 8",
    FidelityMeasure.RADIOMICS_CORRELATION: "Radiomics, correlations",
}


def course_chapters(campaign: CampaignFacts | None) -> tuple[Chapter, ...]:
    """The chapter, or none where the study did not follow the course."""
    if campaign is None or campaign.course is None or campaign.chosen is None:
        return ()
    blocks = tuple(_blocks(campaign, campaign.course, campaign.chosen))
    return (Chapter(number=15, anchor="course", title="Course of training and chosen round", blocks=blocks),)


def _blocks(campaign: CampaignFacts, course: Course, chosen: Chosen) -> Iterator[Block]:
    if course.exact:
        yield Paragraph(
            topic=EXACT_LABEL,
            text="Every number of this chapter was computed from patients without noise, and the round was chosen by "
            "them. Nobody is protected from that; a real hospital refuses it, and nothing of this run can be released.",
        )
    yield Paragraph(topic="Rule", text=_rule(chosen))
    yield Paragraph(topic="Chosen", text=_choice(campaign, chosen))
    if not course.points:
        yield Paragraph(text="No point could be measured.")
    else:
        drawing = points_figure(course, chosen)
        yield Drawing(
            svg=drawing.svg,
            text=drawing.description,
            caption=f"{len(course.points)} points. Bands are {course.points[0].utility.confidence:.0%} intervals; "
            "numbers in the last panel are rounds. Ringed: the chosen round.",
        )
        yield _table(course, chosen)
    unmeasured = [row for row in course.rows if row.point is None]
    if unmeasured:
        text = "; ".join(f"round {row.round}: {row.unmeasured}" for row in unmeasured)
        yield Paragraph(text=f"Not measured: {text}.", quiet=True)
    yield Paragraph(topic="Price", text=_price(course))
    yield Paragraph(text=_caveat(course), quiet=True)
    if course.exact and any(row.fidelity for row in course.rows):
        yield Heading(text="Fidelity", anchor="course-fidelity")
        yield _fidelity(course)


def _rule(chosen: Chosen) -> str:
    limits = []
    if chosen.rule.max_auc < 1:
        limits.append(f"the attack on the generator has an upper AUC limit of at most {chosen.rule.max_auc:g}")
    if chosen.rule.max_epsilon is not None:
        limits.append(f"training has spent at most epsilon {chosen.rule.max_epsilon:g}")
    among = " and ".join(limits) if limits else "there is no limit"
    return f"The round of highest utility among those where {among}. Fixed in the study, before training."


def _choice(campaign: CampaignFacts, chosen: Chosen) -> str:
    if chosen.row is None:
        return f"{chosen.reason}. The last round is what was audited."
    joint = "" if chosen.confidence is None else f" All these AUC limits hold at once with {chosen.confidence:.0%}."
    after = sum(r.round > chosen.row.round for r in campaign.rounds)
    spent = f" {after} later rounds were spent and are not in it." if after else ""
    return f"{chosen.reason[0].upper()}{chosen.reason[1:]}.{joint}{spent}"


def _price(course: Course) -> str:
    if course.exact:
        return "Without end: exact answers have no epsilon, for members and held-out patients alike."
    sites = sorted({site for row in course.rows for site in row.sites})
    cost = max((course.epsilon_of(site) for site in sites), default=0.0)
    return (
        f"At most epsilon {cost:g} for a held-out patient, nothing for one that was trained on; it is in the table of "
        "chapter 4. Choosing among answers that are paid for costs nothing more."
    )


def _caveat(course: Course) -> str:
    measured = (
        ""
        if course.exact
        else ("No attack was carried out here: the AUC limit is what the spent epsilon proves against every attack. ")
    )
    return (
        f"{measured}The round was chosen by how well it serves the held-out patients, with whom the audit then "
        "compares. That tends to make them look like those trained on, and so a leak smaller than it is; and the best "
        "of several points looks a little better than it is."
    )


def _table(course: Course, chosen: Chosen) -> Table:
    front = {course.points[i].round for i in pareto_front(course.points)}
    critic = any(p.critic_attack is not None for p in course.points)
    distances = any(row.hd95_mm for row in course.measured)
    head = ["Round", "Epsilon", "Dice"]
    head += ["HD95 (mm)"] if distances else []
    head += ["Attack on the generator, AUC", "Its control"]
    head += ["Attack by the critic, AUC", "Its control"] if critic else []
    head += ["Front", "Choice"]
    return Table(
        caption="The same in numbers. HD95: mean over held-out patients and labels. Controls compare trained-on "
        "patients with each other, where there is nothing to find.",
        head=tuple(head),
        rows=tuple(_row(row, chosen, front, critic=critic, distances=distances) for row in course.measured),
        numbers=frozenset({0, 1}),
    )


def _row(row: CourseRow, chosen: Chosen, front: set[int], *, critic: bool, distances: bool) -> tuple[Cell, ...]:
    point = row.point
    if point is None:
        raise ValueError("only measured rows are shown")
    cells: list[Cell] = [
        str(row.round),
        epsilon_text("infinite" if point.epsilon_spent is None else point.epsilon_spent),
        dice_text(point.utility),
    ]
    if distances:
        cells.append(f"{sum(row.hd95_mm) / len(row.hd95_mm):.1f}" if row.hd95_mm else "–")
    proven = f"≤ {point.generator_attack.high:.3f}, {'not measured' if point.exact else 'proven'}"
    cells.append(auc_text(point.generator_attack) if row.attacked else proven)
    cells.append("–" if row.generator_control is None else auc_text(row.generator_control))
    if critic:
        cells.append("–" if point.critic_attack is None else auc_text(point.critic_attack))
        cells.append("–" if row.critic_control is None else auc_text(row.critic_control))
    cells.append("on the front" if row.round in front else "beaten")
    is_chosen = chosen.row is not None and chosen.row.round == row.round
    allowed = chosen.rule.allows(point)
    cells.append(Mark(text="chosen" if is_chosen else "allowed" if allowed else "not allowed", good=allowed))
    return tuple(cells)


def _fidelity(course: Course) -> Table:
    rows = [row for row in course.rows if row.fidelity]
    measures = [m for m in FidelityMeasure if any(m in row.fidelity for row in rows)]
    net = (
        f"Fréchet distance, KID and PRD on {course.feature_net} (weights {course.feature_net_digest[:16]})."
        if FidelityMeasure.FRECHET in measures
        else f"Not measured: Fréchet distance, KID and PRD, for which no hospital has the {FEWEST} members needed."
    )
    return Table(
        caption=f"Synthetic scans against each hospital's own members, means weighted by members. {net}",
        head=("Measure", *(f"Round {row.round}" for row in rows)),
        rows=tuple(
            (_FIDELITY[m], *(f"{row.fidelity[m]:.4g}" if m in row.fidelity else "–" for row in rows)) for m in measures
        ),
        numbers=frozenset(range(1, len(rows) + 1)),
    )
