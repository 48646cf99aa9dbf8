"""The report's sentences: what the numbers mean, for a reader who signs but does not compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, assert_never

from common.evidence.predicate import CohortEpsilon, Outcome
from common.measure.audit_plan import Endpoint
from common.privacy import accounting
from common.privacy.noise_grid import noise_statement
from common.privacy.rule import feasibility_text, noise_to_signal
from common.protocol.messages import SegmenterSource
from common.settings.study import Family
from server.audit.facts import CampaignFacts, ReportFacts
from server.audit.numerals import Stated, count_text, in_hundred
from server.audit.result import AuditResult, EndpointResult, MechanismAudit, MechanismVerdict, Verdict
from server.audit.threats import carried_out
from server.federation_epsilon import federation_text
from server.published import README, by_unit, by_unit_text

PAPER_PATCHES = README.patches_per_patient  # of a patient in the publication
_BEYOND_FLOATS = 700.0  # e to this power has no double; the limit is one long before
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


_SIGNS: dict[str, Literal["✓", "✕", "?"]] = {"good": "✓", "bad": "✕", "open": "?"}


def headline(facts: ReportFacts) -> Headline:
    """What was decided, or where nobody decides what was found, in words that promise nothing more."""
    if facts.campaign is not None:
        return _decided(facts.campaign.decision.outcome)
    if facts.audit is None:
        raise ValueError("a report is about an audit, a campaign or both")
    return _found(facts.audit.verdict)


def statements(facts: ReportFacts) -> tuple[Statement, ...]:
    """The plain-language summary: what left, what is proven, tried, visible, and what it is good for."""
    return (*_made(facts), *_audited(facts), *_mechanism(facts), *_useful(facts.campaign))


def reasons(facts: ReportFacts) -> tuple[str, ...]:
    """Why it is not a release, or where nobody decides, not a pass; empty otherwise."""
    if facts.campaign is not None:
        return facts.campaign.decision.reasons
    return facts.audit.reasons if facts.audit else ()


def warm_up_text(campaign: CampaignFacts) -> str | None:
    """What was released before training, and its share of epsilon; None for a study without a warm-up."""
    plan, settings = campaign.plan, campaign.study.warm_up
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
        f"{settings.features(len(campaign.study.labels))} measurements fixed by the study (grey values around each "
        f"label and sizes of labels); one patient's vector clipped to 1; {cost}. The public start was fitted to it."
    )


def guarantee(campaign: CampaignFacts) -> tuple[Statement, ...]:
    """Whose epsilon is whose, what the noise is made of, and what so much noise lets one expect."""
    plan, training = campaign.plan, campaign.study.training
    found = []
    if campaign.federation is not None:
        found.append(Statement(topic="Federation", text=federation_text(campaign.federation)))
    if plan.mechanism.noise_multiplier > 0:
        noise = noise_statement(parameters=campaign.critic_parameters, steps=plan.mechanism.steps, delta=plan.delta)
        rho = noise_to_signal(plan, campaign.critic_parameters)
        expected = feasibility_text(rho, warm_start=campaign.study.warm_start.steps > 0)
        found.append(Statement(topic="Noise", text=noise.removeprefix("Noise: ")))
        found.append(Statement(topic="What to expect", text=expected))
    if training.mode == "paper" and campaign.study.family is Family.WGAN:  # whose unit was the patch
        units = by_unit(plan, patches_per_patient=PAPER_PATCHES)
        found.append(Statement(topic="Paper mode", text=by_unit_text(units).removeprefix("Paper mode. ")))
    return tuple(found)


def largest_epsilon(campaign: CampaignFacts) -> Stated:
    """The upper end for the patient who spent most, used or held out; infinite when nobody stated anything."""
    sites = campaign.decision.sites.values()
    return _largest([cohort.upper for site in sites for cohort in (site.members, site.nonmembers)])


def members_epsilon(campaign: CampaignFacts) -> Stated:
    """The upper end for the used patient who spent most: what bounds every attack on them."""
    return _largest([site.members.upper for site in campaign.decision.sites.values()])


def tpr_limit(epsilon: Stated, delta: float, false_positive_rate: float) -> float:
    """Most members any attack can find at this false-positive rate under (epsilon, delta).  [Kairouz et al. 2015]"""
    if epsilon == "infinite" or epsilon > _BEYOND_FLOATS:
        return 1.0
    a, factor = false_positive_rate, math.exp(epsilon)
    return max(0.0, min(1.0, factor * a + delta, 1.0 - (1.0 - delta - a) / factor))


def site_tpr_limit(spent: CohortEpsilon, false_positive_rate: float) -> float:
    """`tpr_limit` for what a site's patients have spent."""
    return tpr_limit(spent.upper, spent.delta, false_positive_rate)


def worst_auc(audit: AuditResult) -> EndpointResult | None:
    """The endpoint that tells members best from non-members, by its upper bound."""
    return max(audit.endpoints, key=lambda e: e.auc_upper.value, default=None)


def worst_tpr(audit: AuditResult) -> EndpointResult | None:
    """The endpoint that finds most members at the plan's false-positive rate, by its upper bound."""
    return max(audit.endpoints, key=lambda e: e.tpr_upper.value, default=None)


def not_covered(campaign: CampaignFacts) -> tuple[str, ...]:
    """What the privacy guarantee says nothing about."""
    general = (
        "Facts about people in general. What the synthetic scans teach about anatomy or disease may be applied "
        "to anybody, whether their scans were used or not.",
        "That a hospital took part, how many hospitals there were, and every setting in the study file.",
        "Patients with scans in two of these hospitals, under two names, or in an earlier study: "
        "for them the epsilons add up.",
        "Choices that people made by looking at these patients outside the ledger, such as tuning on them beforehand.",
        "The public start: it was fitted to phantoms, which are nobody's scans.",
        "What an insider of a hospital sees on its own machines, and software there that is not the approved one.",
    )
    if campaign.decision.simulated:
        return ("Anybody who knows the seed: this run was simulated, and its noise can be computed again.", *general)
    return general


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


def mechanism_text(found: MechanismAudit) -> str:
    """What a mechanism audit's verdict means; why, where it could not tell."""
    match found.verdict:
        case MechanismVerdict.VIOLATION:
            return "a lower bound lies above what was claimed: the training does not keep its own promise"
        case MechanismVerdict.CONSISTENT:
            return "nothing contradicts the claimed epsilon, although a violation could have been seen"
        case MechanismVerdict.UNINFORMATIVE:
            if found.reasons:
                return f"the claim could not be checked: {'; '.join(found.reasons)}"
            return "so few canaries could not have contradicted the claim, whatever the training did"
        case _:
            assert_never(found.verdict)


def cost_text(epsilon: float | None) -> str:
    """What answering the audit cost one patient."""
    if epsilon is None:
        return "no noise: the answers are exact and have no epsilon"
    return f"epsilon {epsilon:g}"


def _decided(outcome: Outcome) -> Headline:
    match outcome:
        case Outcome.RELEASE:
            return _headline(
                "RELEASE",
                "The auditor tried to tell used patients from patients held out, and failed within the limits that "
                "were fixed before looking. The synthetic scans may be released.",
                "good",
            )
        case Outcome.REJECT:
            return _headline(
                "REJECT", "A condition of release is violated. The synthetic scans stay in quarantine.", "bad"
            )
        case Outcome.INCONCLUSIVE:
            return _headline(
                "INCONCLUSIVE",
                "The auditor could not rule out a leak, and did not show one. That is no evidence of safety: "
                "the synthetic scans stay in quarantine.",
                "open",
            )
        case _:
            assert_never(outcome)


def _found(verdict: Verdict) -> Headline:
    nobody = "This report decides nothing: no release gate has looked at it."
    match verdict:
        case Verdict.PASS:
            return _headline(
                "PASS", f"The attacks failed within the limits that were fixed before looking. {nobody}", "good"
            )
        case Verdict.FAIL:
            return _headline("FAIL", f"A leak was shown. {nobody}", "bad")
        case Verdict.INCONCLUSIVE:
            return _headline(
                "INCONCLUSIVE",
                f"A leak could not be ruled out, and none was shown. That is no evidence of safety. {nobody}",
                "open",
            )
        case _:
            assert_never(verdict)


def _headline(word: str, sentence: str, tone: Literal["good", "bad", "open"]) -> Headline:
    return Headline(word=word, sentence=sentence, tone=tone, sign=_SIGNS[tone])


def _largest(uppers: list[Stated]) -> Stated:
    finite = [upper for upper in uppers if upper != "infinite"]
    return max(finite) if finite and len(finite) == len(uppers) else "infinite"


def _made(facts: ReportFacts) -> Iterator[Statement]:
    campaign = facts.campaign
    if campaign is None:
        yield Statement(
            topic="What was examined",
            text=f"{facts.scans.volumes} synthetic volumes that this software did not make, beside scans of patients "
            "said to have been used for them and scans of patients said to have been held out.",
        )
        yield Statement(
            topic="What is proven",
            text="Nothing. No differential privacy is claimed here, so only the attacks below speak, each for itself.",
        )
        return
    yield Statement(
        topic="What left the hospitals",
        text=f"{count_text(len(campaign.decision.sites), 'hospital')} trained one generator together. Scans, labels "
        "and the networks that looked at them stayed in the hospitals. What left were the generator's weights and "
        f"{_left_beside(campaign, facts.audit)}.",
    )
    yield Statement(topic="What is proven", text=_proven(campaign))


def _left_beside(campaign: CampaignFacts, audit: AuditResult | None) -> str:
    """Whatever left the hospitals beside the generator's weights."""
    parts = ["a few counts with noise added"]
    if campaign.plan.warm_up:
        parts.append("one sum of measurements with noise added")
    if audit is not None and audit.critic is not None:
        parts.append("one randomised yes or no")
    if audit is not None and audit.mechanism is not None:
        parts.append("how many guesses about invented records were right")
    return ", ".join(parts[:-1]) + (", and " if len(parts) > 1 else "") + parts[-1]


def _proven(campaign: CampaignFacts) -> str:
    epsilon, delta = largest_epsilon(campaign), campaign.study.privacy.delta
    if epsilon == "infinite":
        return (
            "Nothing. At least one hospital trained without noise or answered exactly, or none stated what it spent; "
            "there is no epsilon and no guarantee for its patients."
        )
    text = (
        "Whoever studies everything that was published can improve the odds of a guess about any one patient by a "
        f"factor of at most {_odds(epsilon)} (epsilon {epsilon:.2f}; but for a chance of {delta:g}), compared with a "
        "campaign without that patient."
    )
    if epsilon > WEAK_PROOF:
        text += " That is a large factor. The proof alone would not stop every attacker, so the audit carries weight."
    return text


def _odds(epsilon: float) -> str:
    """The factor e^epsilon for people. "At most" is rounded up, to two digits."""
    if epsilon > math.log(1e6):
        return f"10 to the power of {math.ceil(epsilon / math.log(10))}"
    factor = math.exp(epsilon)
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return f"{math.ceil(factor / unit) * unit:,.{1 if factor < 10 else 0}f}"


def _audited(facts: ReportFacts) -> Iterator[Statement]:
    audit = facts.audit
    auc, tpr = (worst_auc(audit), worst_tpr(audit)) if audit else (None, None)
    if audit is None or auc is None or tpr is None:
        yield Statement(
            topic="What was tried", text="The audit measured nothing that can be used; see its reasons below."
        )
        return
    limits, confidence = audit.thresholds, f"{100 * audit.confidence:g} %"
    tried = [name for name in carried_out(facts) if name != Endpoint.FUSED]
    held_out = "patients held out at random" if facts.scans.random_holdout else "patients said to be held out"
    yield Statement(
        topic="What was tried",
        text=(
            f"{count_text(len(tried), 'attack')} tried to recognise the patients that were used among "
            f"{held_out}. Shown one of each, the best ranked the used one higher in "
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
        else "The audit's own controls did not all behave as they must, so that its numbers rule nothing out."
    )
    if copies is None or copies >= 1:
        return (
            f"With these patients and this noise the audit could not have seen any share of copied patients. {caught}"
        )
    return (
        f"If {in_hundred(copies)} patients had been copied, the audit would have noticed with 90 % probability; "
        f"the limit is {in_hundred(audit.thresholds.max_detectable_copies)}. {caught}"
    )


def _mechanism(facts: ReportFacts) -> Iterator[Statement]:
    audit = facts.audit
    if audit is not None and audit.mechanism is not None:
        found = audit.mechanism
        yield Statement(
            topic="Does the noise work",
            text=f"{found.canaries} invented records were trained on or not, each by a coin, and guessed at "
            f"afterwards: {found.correct} of {found.guesses} guesses were right. {found.verdict.value.upper()}: "
            f"{mechanism_text(found)}.",
        )


def _useful(campaign: CampaignFacts | None) -> Iterator[Statement]:
    if campaign is None or campaign.utility is None or not campaign.utility.rows:
        return
    words = {
        SegmenterSource.SYNTHETIC: "trained on synthetic scans alone",
        SegmenterSource.PHANTOM: "on public phantoms alone",
        SegmenterSource.REAL: "on real scans inside each hospital",
    }
    found = "; ".join(f"{words[row.source]}, {row.mean.estimate:.2f}" for row in campaign.utility.rows)
    yield Statement(
        topic="What it is good for",
        text="Overlap (Dice, 1 is perfect) of a segmentation network with the experts' outlines on held-out patients: "
        f"{found}.",
    )
