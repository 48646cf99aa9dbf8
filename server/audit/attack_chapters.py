"""Chapters 5 to 7: what was tried, how often patients were recognised, and whether any was copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from common.measure.audit_plan import Endpoint
from server.audit import attack_figures
from server.audit.document import Block, Bullets, Cell, Chapter, Code, Drawing, Heading, Mark, Paragraph, Table
from server.audit.facts import NearCopies, ReportFacts, Resemblance
from server.audit.limit_tables import kept, lift_text, limit_tables
from server.audit.numerals import auc_text, rate_text, share_text
from server.audit.result import AttributeInference, AuditResult, EndpointResult, RocPoint, Verdict
from server.audit.threats import attack_of, attack_title, carried_out, not_tested, resolvable
from server.audit.wording import members_epsilon, tpr_limit

_LOW_RATES = (1e-2, 1e-3)  # where the field reports how many members are found
_PREVALENCES = (1e-3, 1e-2, 1e-1)  # of used patients among the people an attacker can choose from
_TAIL = 3  # highest bin edges shown in the table of near copies

_NO_ATTACK = "No attack gave a result that can be used, so nothing here shows safety."


def threats(facts: ReportFacts) -> Chapter:
    """(5) The threat models that were tested, and those that were not."""
    done = carried_out(facts)
    endpoints = {e.name.value for e in facts.audit.endpoints} if facts.audit else set()
    rows = [
        (
            attack_title(name),
            f"Somebody who has {attack_of(name).needs}",
            attack_of(name).how,
            _reported(name, endpoints),
        )
        for name in done
    ]
    rows += list(_other_tests(facts.audit)) if facts.audit else []
    tested: Block = (
        Table(caption="Tested", head=("Attack", "Attacker", "What it asks", "Reported"), rows=tuple(rows))
        if rows
        else Paragraph(text=_NO_ATTACK)
    )
    blocks = (
        tested,
        Heading(text="Not tested", anchor="not-tested"),
        Paragraph(text="This report says nothing about:"),
        Bullets(items=not_tested(facts)),
    )
    return Chapter(number=5, anchor="threats", title="Threat models: tested and not tested", blocks=blocks)


def attacks(facts: ReportFacts) -> Chapter:
    """(6) Every attack's numbers, by hospital, at low false-positive rates and at realistic prevalence."""
    title, audit = "Attacks: can used patients be recognised?", facts.audit
    if audit is None:
        nothing = Paragraph(text=f"There was no audit. {_NO_ATTACK}")
        return Chapter(number=6, anchor="attacks", title=title, blocks=(nothing,))
    blocks: list[Block] = [Paragraph(topic="Verdict of the audit", text=_verdict(audit))]
    if audit.reasons:
        blocks.append(Bullets(items=audit.reasons))
    if audit.endpoints:
        blocks += _drawings(facts, audit)
        blocks += limit_tables(facts)
        blocks += [_by_site(audit), _low_rates(audit), _prevalence(audit), *_further(audit)]
    else:
        blocks.append(Paragraph(text=_NO_ATTACK))
    if audit.inference is not None:
        blocks += [Heading(text="What else can be inferred about a patient", anchor="inference")]
        blocks += [_inference(audit.inference, audit.thresholds.max_inference_lift)]
    return Chapter(number=6, anchor="attacks", title=title, blocks=tuple(blocks))


def near_copies(facts: ReportFacts) -> Chapter:
    """(7) Patients who stand out as copies."""
    title, audit = "Near copies", facts.audit
    if audit is None or not audit.endpoints:
        return Chapter(number=7, anchor="near-copies", title=title, blocks=(Paragraph(text=_NO_ATTACK),))
    rows = []
    for e in audit.endpoints:
        shown = share_text(e.copies_lower.value) if e.copies_lower.value > 0 else "none shown"
        clean = e.copies_lower.value <= 0
        mark = Mark(text="no patient stands out" if clean else "patients stand out", good=clean)
        rows.append((attack_title(e.name), shown, share_text(e.copies_upper.value), mark))
    blocks: list[Block] = [
        Paragraph(
            text=f"Every patient was compared with {facts.scans.volumes} synthetic volumes. A patient counts as copied "
            "who scores beyond what the patients held out explain. “At most” counts only copies that score above the "
            "threshold; a copy that scores below it is seen by no number here."
        ),
        Table(
            caption="Share of used patients who stand out as copies "
            f"(lower bound at {100 * audit.endpoints[0].copies_lower.confidence:g} %, upper bound at "
            f"{100 * audit.endpoints[0].copies_upper.confidence:g} % confidence)",
            head=("Attack", "At least", "At most", "Finding"),
            rows=tuple(rows),
            numbers=frozenset({1, 2}),
        ),
        _tail(audit),
        *_pairs(facts.near_copies),
    ]
    return Chapter(number=7, anchor="near-copies", title=title, blocks=tuple(blocks))


def positive_predictive_value(tpr: float, false_positive_rate: float, prevalence: float) -> float:
    """Chance that somebody accused was used, when `prevalence` of all candidates were.  [Bayes; El Emam et al. 2022]"""
    found, accused = prevalence * tpr, (1 - prevalence) * false_positive_rate
    return found / (found + accused) if found + accused > 0 else 0.0


def read_curve(endpoint: EndpointResult, rate: float) -> RocPoint:
    """The ROC at a false-positive rate; a threshold between two bin edges is reached by tossing a coin."""
    known = [p.false_positive_rate for p in endpoint.roc]
    found, low, high = (
        float(np.interp(rate, known, [getattr(p, name) for p in endpoint.roc]))
        for name in ("true_positive_rate", "low", "high")
    )
    return RocPoint(false_positive_rate=rate, true_positive_rate=found, low=low, high=high)


def _reported(name: str, endpoints: set[str]) -> str:
    if name == Endpoint.FUSED:
        return "primary endpoint"
    return "within the combined score" + (", and on its own" if name in endpoints else "")


def _other_tests(audit: AuditResult) -> Iterator[tuple[str, str, str, str]]:
    if any(e.set_membership for e in audit.endpoints):
        yield (
            "Set membership",
            "Somebody who has the scans of a whole group",
            "Whether a hospital's used patients as a group score higher than those held out.",
            "by hospital",
        )
    if audit.inference is not None:
        yield (
            "Attribute inference",
            "Somebody who has the patient's scan and synthetic volumes",
            f"Whether having been used makes this easier to answer: {audit.inference.question}",
            "as a lift",
        )
    if audit.critic is not None:
        yield (
            "A hospital's own critic",
            "An insider of a hospital",
            "Whether the network that looked at patients gives them away; a control, it never leaves.",
            "in chapter 9",
        )
    if audit.mechanism is not None:
        yield (
            "Canaries in training",
            "Somebody who sees every noised step",
            "Whether the noise delivers the epsilon that was accounted for.",
            "in chapter 8",
        )


def _verdict(audit: AuditResult) -> str:
    text = f"{audit.verdict.value.upper()}. "
    if audit.members is not None:
        exact = audit.epsilon_members is None
        counts = f"{audit.members} used and {audit.nonmembers} held-out patients"
        text += f"{counts} " if exact else f"About {counts} (counts with noise) "
        text += f"of {len(audit.sites)} hospital{'s' if len(audit.sites) != 1 else ''}, compared inside each. "
    text += f"Intervals and bounds have {100 * audit.confidence:g} % confidence"
    text += "." if audit.epsilon_members is None else " and include the noise of the answers."
    if audit.verdict is Verdict.PASS:
        text += " All conditions had to hold together, so none is corrected for being one of several."
    return text


def _drawings(facts: ReportFacts, audit: AuditResult) -> Iterator[Block]:
    bounds = attack_figures.bounds_figure(audit)
    yield Drawing(
        svg=bounds.svg,
        text=bounds.description,
        caption="What the verdict compared: an upper bound, the bar, must not lie right of its limit, the diamond.",
    )
    if not all(e.roc and e.histograms for e in audit.endpoints):
        return
    proven = None
    if facts.campaign is not None and (epsilon := members_epsilon(facts.campaign)) != "infinite":
        delta = facts.campaign.study.privacy.delta

        def proven(rate: float) -> float:
            return tpr_limit(epsilon, delta, rate)

    roc = attack_figures.roc_figure(audit, proven)
    yield Drawing(
        svg=roc.svg,
        text=roc.description,
        caption="A curve that follows the dashed line is guessing. The left end matters: few people wrongly accused, "
        "so an accusation would be believed. The red line is the most that may be found there for a release"
        + (
            "; the dotted curve is what the largest epsilon proves against every attack. "
            if proven is not None
            else ". "
        )
        + "What lies below a thousandth, or outside 0 to 100 % by noise, is drawn at the edge.",
    )
    histograms = attack_figures.histogram_figure(audit)
    yield Drawing(
        svg=histograms.svg,
        text=histograms.description,
        caption=f"Bins of the audit plan, drawn equally wide. {_shown_counts(audit)} A "
        "generator that had copied its patients would show members to the right of those held out, as the copies made "
        "on purpose are.",
    )


def _by_site(audit: AuditResult) -> Table:
    rows = []
    for e in audit.endpoints:
        as_group = {found.site: f"{found.p_value:.3g}" for found in e.set_membership}
        for s in e.sites:
            counts = (str(s.members), str(s.nonmembers))
            measured = (auc_text(s.auc), f"≤ {s.upper.value:.3f}", as_group.get(s.site, "not tested"))
            rows.append((attack_title(e.name), s.site, *counts, *measured))
    return Table(
        caption="By hospital: patients are compared inside one hospital, so that scanners do not pass for membership. "
        "As a set: how surprising it is, if being used made no difference, that the used patients as a group score so "
        "much higher (one-sided p value; a large one shows nothing)",
        head=("Attack", "Hospital", "Used", "Held out", "AUC (interval)", "Bound", "As a set, p"),
        rows=tuple(rows),
        numbers=frozenset(range(2, 7)),
    )


def _low_rates(audit: AuditResult) -> Table:
    rates = sorted({audit.false_positive_rate, *_LOW_RATES}, reverse=True)
    rows = [(attack_title(e.name), *(_at_rate(audit, e, rate) for rate in rates)) for e in audit.endpoints]
    return Table(
        caption="Members found where few people are wrongly accused. At the plan's rate with its own interval; "
        "elsewhere read from the curve with its pointwise band",
        head=("Attack", *(f"at {share_text(rate)} wrongly accused" for rate in rates)),
        rows=tuple(rows),
        numbers=frozenset(range(1, len(rates) + 1)),
    )


def _at_rate(audit: AuditResult, endpoint: EndpointResult, rate: float) -> str:
    if rate == audit.false_positive_rate:
        return rate_text(endpoint.tpr)
    if not resolvable(endpoint, rate) or not endpoint.roc:
        return f"not resolvable with n = {endpoint.nonmembers}"
    point = read_curve(endpoint, rate)
    return f"{share_text(point.true_positive_rate)} ({share_text(point.low)} to {share_text(point.high)})"


def _prevalence(audit: AuditResult) -> Table:
    rate, confidence = audit.false_positive_rate, f"{100 * audit.confidence:g} % confidence"
    rows = []
    for e in audit.endpoints:
        audited = e.members / max(e.members + e.nonmembers, 1)
        at = [
            share_text(positive_predictive_value(min(max(e.tpr_upper.value, 0.0), 1.0), rate, prevalence))
            for prevalence in (*_PREVALENCES, audited)
        ]
        rows.append((attack_title(e.name), *at))
    return Table(
        caption="Chance that a person accused by the attack was really used, at most, by how many of the people whom "
        f"the attacker can choose from were used. From the upper bound ({confidence}) on members found at "
        f"{share_text(rate)} wrongly accused; the last column is the mixture in this audit, which no attacker meets",
        head=("Attack", *(f"{share_text(p)} were used" for p in _PREVALENCES), "as in this audit"),
        rows=tuple(rows),
        numbers=frozenset(range(1, len(_PREVALENCES) + 2)),
    )


def _further(audit: AuditResult) -> Iterator[Block]:
    proven = [(e.name, e.epsilon_lower) for e in audit.endpoints if e.epsilon_lower is not None]
    if proven:
        yield Table(
            caption="What the attack shows about epsilon by itself: at least so much, and the most that a perfect "
            "attack on so many patients could have shown",
            head=("Attack", "Method", "Epsilon at least", "Ceiling", "Delta", "Confidence"),
            rows=tuple(
                (
                    attack_title(name),
                    bound.method + (f" (assuming {bound.assumption})" if bound.assumption else ""),
                    f"{bound.value.value:.2f}",
                    f"{bound.ceiling:.2f}",
                    f"{bound.delta:g}",
                    f"{100 * bound.value.confidence:g} %",
                )
                for name, bound in proven
            ),
            numbers=frozenset({2, 3, 4, 5}),
        )


def _inference(found: AttributeInference, limit: float) -> Table:
    return Table(
        caption=f"{found.question} Answered from a patient's image and the synthetic volumes. The lift is what having "
        f"been used adds; what holds for everybody is no leak about anybody. At most: at "
        f"{100 * found.upper.confidence:g} % confidence",
        head=("Used, answered right", "Held out, answered right", "Lift in points", "At most", "Limit", "Kept"),
        rows=(
            (
                rate_text(found.members),
                rate_text(found.nonmembers),
                f"{lift_text(found.lift.estimate)} ({lift_text(found.lift.low)} to {lift_text(found.lift.high)})",
                lift_text(found.upper.value),
                f"{100 * limit:g}",
                kept(found.upper.value <= limit),
            ),
        ),
        numbers=frozenset({0, 1, 2, 3, 4}),
    )


def _pairs(found: NearCopies | None) -> Iterator[Block]:
    """Which volume shows whom, where the reader owns the scans."""
    if found is None:
        yield Paragraph(
            text="These are counts of patients, not of volumes. Which volume resembles whom does not leave a hospital, "
            "and this report holds no record of anybody having looked at pairs; chapter 14 has room for it.",
            quiet=True,
        )
        return
    yield Paragraph(
        topic="Pairs to look at",
        text=f"{found.members_beyond} used patients score above every patient held out; about "
        f"{found.expected_beyond:.1f} would if nothing had leaked. The held-out scan that scores highest has "
        f"similarity {found.held_out:.3f}. File names are personal data; nobody is recorded as having looked at these "
        "pairs, and chapter 14 has room for it.",
    )
    if found.pairs:
        yield Table(
            caption="Synthetic volumes beside the used patient's scan that they show, most similar first, at most a "
            "hundred. Similarity of fine structure, over small shifts and a left–right flip; 1 is equal",
            head=("Synthetic volume", "Used patient's scan", "Similarity", "Voxels"),
            rows=tuple(
                (Code(text=p.synthetic), Code(text=p.member), f"{p.similarity:.3f}", _voxels(p)) for p in found.pairs
            ),
            numbers=frozenset({2}),
        )


def _voxels(pair: Resemblance) -> Cell:
    return Mark(text="the very same", good=False) if pair.identical else "not the same"


def _tail(audit: AuditResult) -> Table:
    """Counts beyond the highest edges, as they are shown."""
    endpoints = [e for e in audit.endpoints if e.histograms]
    exact = audit.epsilon_members is None
    groups = (("member_a", "member_b"), ("nonmember",), ("planted",))
    rows: list[tuple[Cell, ...]] = []
    for e in endpoints:
        counts = {histogram.group: histogram.counts for histogram in e.histograms}
        last = len(e.edges)
        if exact:  # a fine grid ends in bins that nobody reaches
            last = 1 + max((i for i in range(last) if any(sum(c[i + 1 :]) for c in counts.values())), default=last - 1)
        for edge in range(max(0, last - _TAIL), last):
            beyond = (_beyond([counts[part] for part in parts if part in counts], edge) for parts in groups)
            rows.append((attack_title(e.name), f"{e.edges[edge]:g}", *beyond))
    return Table(
        caption=f"Patients in the highest bins. {_shown_counts(audit).removesuffix('.')}",
        head=("Attack", "Score at least", "Used", "Held out", "Held out, some copied on purpose"),
        rows=tuple(rows),
        numbers=frozenset({1, 2, 3, 4}),
    )


def _shown_counts(audit: AuditResult) -> str:
    """What was done to the counts before they were shown."""
    if audit.epsilon_members is None:
        return "Counts are exact."
    return (
        "Counts carry noise and are fitted so that none is below zero; the bounds use the raw noised answers in "
        "audit/answers.json."
    )


def _beyond(counts: Sequence[Sequence[int]], edge: int) -> str:
    if not counts:
        return "not counted"
    return f"{sum(sum(group[edge + 1 :]) for group in counts)} of {sum(map(sum, counts))}"
