"""The report's sentences: what the numbers mean, for a reader who signs but does not compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, assert_never

from common.evidence.predicate import CohortEpsilon, Outcome
from common.measure.intervals import Interval
from common.privacy import accounting
from common.privacy.noise_grid import noise_statement
from common.privacy.rule import feasibility_text, noise_to_signal
from common.protocol.messages import SegmenterSource
from server.audit.facts import ReportFacts
from server.audit.result import AuditResult, EndpointResult
from server.federation_epsilon import federation_text
from server.published import README, by_unit, by_unit_text

Stated = float | Literal["infinite"]

PAPER_PATCHES = README.patches_per_patient  # of a patient in the publication
WEAK_PROOF = 3.0  # above this, the proof alone leaves an attacker most of the certainty there is to gain


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The verdict in three lengths. tone names the colour of the banner; sign repeats it without colour."""

    word: str
    sentence: str
    tone: Literal["good", "bad", "open"]
    sign: str


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One line of the plain-language summary."""

    topic: str
    text: str


def headline(facts: ReportFacts) -> Headline:
    """What was decided, in words that promise nothing more."""
    match facts.decision.outcome:
        case Outcome.RELEASE:
            return Headline(
                word="RELEASE",
                sentence="The auditor tried to tell used patients from patients held out, and failed within the limits "
                "that were fixed before looking. The synthetic scans may be released.",
                tone="good",
                sign="✓",
            )
        case Outcome.REJECT:
            return Headline(
                word="REJECT",
                sentence="A condition of release is violated. The synthetic scans stay in quarantine.",
                tone="bad",
                sign="✕",
            )
        case Outcome.INCONCLUSIVE:
            return Headline(
                word="INCONCLUSIVE",
                sentence="The auditor could not rule out a leak, and did not show one. That is no evidence of safety: "
                "the synthetic scans stay in quarantine.",
                tone="open",
                sign="?",
            )
        case _:
            assert_never(facts.decision.outcome)


def statements(facts: ReportFacts) -> tuple[Statement, ...]:
    """The plain-language summary: what left, what is proven, tried, visible, and what it is good for."""
    sites = len(facts.decision.sites)
    sums = ", one sum of measurements" if facts.plan.warm_up else ""
    left = (
        f"{_count(sites, 'hospital')} trained one generator together. Scans, labels and the networks that looked at "
        f"them stayed in the hospitals. What left were the generator's weights{sums} and a few counts with noise added."
    )
    return (
        Statement(topic="What left the hospitals", text=left),
        Statement(topic="What is proven", text=_proven(facts)),
        *_audited(facts),
        *_useful(facts),
    )


def warm_up_text(facts: ReportFacts) -> str | None:
    """What was released before training, and its share of epsilon; None for a study without a warm-up."""
    plan, settings = facts.plan, facts.study.warm_up
    if plan.warm_up is None or settings is None:
        return None
    spent = accounting.epsilon([plan.warm_up], plan.delta).upper
    cost = (
        "without noise, so without a guarantee"
        if math.isinf(spent)
        else f"noise multiplier {plan.warm_up.noise_multiplier:.4g}, epsilon {spent:.2f} by itself, included above"
    )
    return (
        "before training each hospital released once the sum, over its used patients, of "
        f"{settings.features(len(facts.study.labels))} measurements fixed by the study (grey values around each label "
        f"and sizes of labels); one patient's vector clipped to 1; {cost}. The public start was fitted to it."
    )


def guarantee(facts: ReportFacts) -> tuple[Statement, ...]:
    """Whose epsilon is whose, what the noise is made of, and what so much noise lets one expect."""
    plan, training = facts.plan, facts.study.training
    found = []
    if facts.federation is not None:
        found.append(Statement(topic="Federation", text=federation_text(facts.federation)))
    if plan.mechanism.noise_multiplier > 0:
        noise = noise_statement(parameters=facts.critic_parameters, steps=plan.mechanism.steps, delta=plan.delta)
        rho = noise_to_signal(plan, facts.critic_parameters)
        expected = feasibility_text(rho, warm_start=facts.study.warm_start.steps > 0)
        found.append(Statement(topic="Noise", text=noise.removeprefix("Noise: ")))
        found.append(Statement(topic="What to expect", text=expected))
    if training.mode == "paper":
        units = by_unit(plan, patches_per_patient=PAPER_PATCHES)
        found.append(Statement(topic="Paper mode", text=by_unit_text(units).removeprefix("Paper mode. ")))
    return tuple(found)


def largest_epsilon(facts: ReportFacts) -> Stated:
    """The upper end for the patient who spent most, used or held out; infinite when nobody stated anything."""
    sites = facts.decision.sites.values()
    uppers = [cohort.upper for site in sites for cohort in (site.members, site.nonmembers)]
    finite = [upper for upper in uppers if upper != "infinite"]
    return max(finite) if finite and len(finite) == len(uppers) else "infinite"


def tpr_limit(spent: CohortEpsilon, false_positive_rate: float) -> float:
    """Most members any attack can find at this false-positive rate under (epsilon, delta).  [Kairouz et al. 2015]"""
    if spent.upper == "infinite":
        return 1.0
    a, factor = false_positive_rate, math.exp(spent.upper)
    return max(0.0, min(1.0, factor * a + spent.delta, 1.0 - (1.0 - spent.delta - a) / factor))


def worst_auc(audit: AuditResult) -> EndpointResult | None:
    """The endpoint that tells members best from non-members, by its upper bound."""
    return max(audit.endpoints, key=lambda e: e.auc_upper.value, default=None)


def worst_tpr(audit: AuditResult) -> EndpointResult | None:
    """The endpoint that finds most members at the plan's false-positive rate, by its upper bound."""
    return max(audit.endpoints, key=lambda e: e.tpr_upper.value, default=None)


def in_hundred(rate: float) -> str:
    """A rate as a count of a hundred, clipped: noise may carry an estimate below zero."""
    return f"{100 * min(max(rate, 0.0), 1.0):.1f}".removesuffix(".0") + " in 100"


def not_covered(facts: ReportFacts) -> tuple[str, ...]:
    """What the privacy guarantee says nothing about."""
    general = (
        "Facts about people in general. What the synthetic scans teach about anatomy or disease may be applied "
        "to anybody, whether their scans were used or not.",
        "That a hospital took part, how many hospitals there were, and every setting in the study file.",
        "Patients with scans in two of these hospitals, under two names, or in an earlier study: "
        "for them the epsilons add up.",
        "Choices that people made by looking at these patients outside the ledger, such as tuning on them beforehand.",
        "What an insider of a hospital sees on its own machines, and software there that is not the approved one.",
    )
    if facts.decision.simulated:
        return ("Anybody who knows the seed: this run was simulated, and its noise can be computed again.", *general)
    return general


def not_tested(facts: ReportFacts) -> tuple[str, ...]:
    """Attacks that this audit did not carry out; it says nothing about them."""
    rate = facts.study.audit.false_positive_rate
    return (
        "Inversion of the released weights, and other attacks that open the generator up.",
        "Density-ratio, substitute-classifier and set-membership attacks, which need a reference population.",
        "Inference of a patient's attributes (age, sex, diagnosis), and linking the same patient across two releases.",
        "Planted canaries in the training of the critic, which would test the noise itself.",
        f"Recognition at less than {100 * rate:g} % wrongly accused: this many patients cannot resolve it.",
    )


def epsilon_text(value: Stated) -> str:
    """Epsilon for people: two decimals, or that there is none."""
    return "∞" if value == "infinite" else f"{value:.2f}"


def source_text(source: SegmenterSource) -> str:
    """What a segmenter was trained on."""
    match source:
        case SegmenterSource.SYNTHETIC:
            return "Synthetic scans of this study"
        case SegmenterSource.PHANTOM:
            return "Public phantoms"
        case SegmenterSource.REAL:
            return "Real members, at home (simulation only: exact, not covered by epsilon, not in what was signed)"
        case _:
            assert_never(source)


def dice_text(interval: Interval) -> str:
    """Estimate and interval."""
    return f"{interval.estimate:.3f} ({max(interval.low, 0.0):.3f} to {min(interval.high, 1.0):.3f})"


def _proven(facts: ReportFacts) -> str:
    epsilon, delta = largest_epsilon(facts), facts.study.privacy.delta
    if epsilon == "infinite":
        return (
            "Nothing. At least one hospital trained without noise or answered exactly, or none stated what it spent; "
            "there is no epsilon and no guarantee for its patients."
        )
    factor = math.exp(epsilon)
    # "At most" is rounded up, to two digits.
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    odds = f"{math.ceil(factor / unit) * unit:,.{1 if factor < 10 else 0}f}"
    text = (
        "Whoever studies everything that was published can improve the odds of a guess about any one patient by a "
        f"factor of at most {odds} (epsilon {epsilon:.2f}; but for a chance of {delta:g}), compared with a campaign "
        "without that patient."
    )
    if epsilon > WEAK_PROOF:
        text += " That is a large factor. The proof alone would not stop every attacker, so the audit carries weight."
    return text


def _audited(facts: ReportFacts) -> Iterator[Statement]:
    audit = facts.audit
    auc, tpr = (worst_auc(audit), worst_tpr(audit)) if audit else (None, None)
    if audit is None or auc is None or tpr is None:
        yield Statement(
            topic="What was tried", text="The audit measured nothing that can be used; see its reasons below."
        )
        return
    limits, confidence = audit.thresholds, f"{100 * audit.confidence:g} %"
    yield Statement(
        topic="What was tried",
        text=(
            f"{_count(len(audit.endpoints), 'attack')} tried to recognise the patients that were used among patients "
            "held out at random. Shown one of each, the best ranked the used one higher in "
            f"{in_hundred(auc.auc.estimate)} cases (50 is guessing; with {confidence} confidence at most "
            f"{in_hundred(auc.auc_upper.value)}, allowed {in_hundred(limits.max_auc)}). "
            f"Where {in_hundred(audit.false_positive_rate)} held-out patients is wrongly accused, it found "
            f"{in_hundred(tpr.tpr.estimate)} of those used (at most {in_hundred(tpr.tpr_upper.value)}, "
            f"allowed {in_hundred(limits.max_tpr)})."
        ),
    )
    yield Statement(topic="What could be seen", text=_visible(audit))


def _visible(audit: AuditResult) -> str:
    copies = audit.smallest_detectable_copies
    caught = (
        "Copies that were planted on purpose were caught, and used patients could not be told from other used patients."
        if audit.controls_caught
        else "The audit's own controls did not behave as they must, so its numbers show nothing."
    )
    if copies is None or copies >= 1:
        return (
            f"With these patients and this noise the audit could not have seen any share of copied patients. {caught}"
        )
    return (
        f"If {in_hundred(copies)} patients had been copied, the audit would have noticed with 90 % probability; "
        f"the study tolerates {in_hundred(audit.thresholds.max_detectable_copies)}. {caught}"
    )


def _useful(facts: ReportFacts) -> Iterator[Statement]:
    if facts.utility is None or not facts.utility.rows:
        return
    words = {
        SegmenterSource.SYNTHETIC: "trained on synthetic scans alone",
        SegmenterSource.PHANTOM: "on public phantoms alone",
        SegmenterSource.REAL: "on real scans inside each hospital",
    }
    found = "; ".join(f"{words[row.source]}, {row.mean.estimate:.2f}" for row in facts.utility.rows)
    yield Statement(
        topic="What it is good for",
        text="Overlap (Dice, 1 is perfect) of a segmentation network with the experts' outlines on held-out patients: "
        f"{found}.",
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
