"""Did training deliver the epsilon it claims? The judgement on guesses about canaries. Pure.

The claim is that of training alone, the noised steps of the critic; the warm-up's release has no canaries.

(1) Bounds on all sites together, and, where there are several, on each alone: one hospital whose machine makes bad
    noise would be lost among ten that do not. The error is shared out, so that a true claim is called a
    violation with at most 1 - confidence.
(2) VIOLATION: a proven lower bound lies above the claim.
(3) UNINFORMATIVE: even perfect guesses could not have shown that; or a site did not answer, because a claim about all
    sites is not checked by some of them; or a site's canaries were heard so little that they cannot have taken
    part as planned, and what was not heard proves nothing.
(4) CONSISTENT otherwise: not shown to be false, with what could have been shown beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scipy.stats import beta

from common.measure.epsilon_bounds import EpsilonBound
from common.measure.one_run import (
    GUESS_RULES,
    Guesses,
    OneRunBounds,
    add_up,
    gaussian_accuracy,
    one_run_bounds,
)
from common.privacy.accounting import epsilon
from common.privacy.mechanism import DpSgd, Plan
from server.audit.result import MechanismAudit, MechanismVerdict

DEAF = 1e-3  # probability, over all sites, of calling canaries unheard that were heard half as well as they should

SiteGuesses = Mapping[str, Sequence[Guesses]]


def judge_mechanism(
    plan: Plan, canaries: int, answers: SiteGuesses, missing: Mapping[str, str], *, confidence: float
) -> MechanismAudit:
    """The verdict on every site's guesses. canaries: of each site. missing: fixed phrase by site that did not answer.

    Raises ValueError for a plan without noise: it claims nothing that could be refuted.
    """
    claim = epsilon([plan.mechanism], plan.delta).upper
    if not math.isfinite(claim):
        raise ValueError("a plan without noise claims no epsilon")
    silent = [f"{site} did not answer ({reason}); its training is not checked" for site, reason in missing.items()]
    if not answers:
        return MechanismAudit(
            verdict=MechanismVerdict.UNINFORMATIVE,
            canaries=0,
            guesses=0,
            correct=0,
            claimed_epsilon=claim,
            delta=plan.delta,
            bounds=(),
            without_noise=0.0,
            reasons=(*silent, "no site answered"),
        )
    error = (1 - confidence) / (1 if len(answers) == 1 else 2)
    total = canaries * len(answers)
    pooled = add_up(answers.values())
    bounds = one_run_bounds(total, pooled, delta=plan.delta, confidence=1 - error)
    violations = _above("all sites together", bounds, claim)
    if len(answers) > 1:
        for site, guesses in sorted(answers.items()):
            alone = one_run_bounds(canaries, guesses, delta=plan.delta, confidence=1 - error / len(answers))
            violations += _above(site, alone, claim)
    doubts = [*silent, *_deaf(plan.mechanism, answers), *_too_few(bounds, claim)]
    if violations:
        verdict, reasons = MechanismVerdict.VIOLATION, violations
    elif doubts:
        verdict, reasons = MechanismVerdict.UNINFORMATIVE, doubts
    else:
        verdict, reasons = MechanismVerdict.CONSISTENT, []
    most = max(pooled, key=lambda g: g.guesses)
    return MechanismAudit(
        verdict=verdict,
        canaries=total,
        guesses=most.guesses,
        correct=most.correct,
        claimed_epsilon=claim,
        delta=plan.delta,
        bounds=bounds.all,
        without_noise=_without_noise(plan, canaries, len(answers), confidence=1 - error),
        reasons=tuple(reasons),
    )


def heard_mu(mechanism: DpSgd) -> float:
    """Signal / noise of one canary's running total after a faithful training, patients' part left out.

    In: T draws with probability q, mean q T and variance T q (1 - q) on top of the noise's T sigma^2; out: the
    noise alone. The larger deviation is taken for both.
    """
    q, steps = mechanism.sampling_probability, mechanism.steps
    return q * math.sqrt(steps) / math.sqrt(mechanism.noise_multiplier**2 + q * (1 - q))


def _above(who: str, bounds: OneRunBounds, claim: float) -> list[str]:
    return [
        f"{who}: {bound.method} proves epsilon of at least {bound.value.value:.3f} ({bound.value.confidence:.1%} "
        f"confidence{_if(bound)}); {claim:.3f} is claimed"
        for bound in bounds.proven
        if bound.value.value > claim
    ]


def _if(bound: EpsilonBound) -> str:
    return f", if {bound.assumption}" if bound.assumption else ""


def _too_few(bounds: OneRunBounds, claim: float) -> list[str]:
    ceiling = max(bound.ceiling for bound in bounds.proven)
    if ceiling >= claim:
        return []
    return [f"even perfect guesses would prove an epsilon of {ceiling:.3f} only; {claim:.3f} is claimed"]


def _deaf(mechanism: DpSgd, answers: SiteGuesses) -> list[str]:
    """Sites that guess worse than they would with half the signal a faithful training gives.

    Half, because patients pull the critic along the canaries' directions as well, which drowns a part of it.
    """
    reasons = []
    for site, guesses in sorted(answers.items()):
        g = max(guesses, key=lambda at: at.guesses)
        least = gaussian_accuracy(heard_mu(mechanism) / 2, g.rule)
        if g.correct < g.guesses and beta.ppf(1 - DEAF / len(answers), g.correct + 1, g.guesses - g.correct) < least:
            reasons.append(
                f"{site}: {g.correct} of {g.guesses} guesses are right, fewer than canaries that took part as planned "
                "would give; what was not heard proves nothing"
            )
    return reasons


def _without_noise(plan: Plan, canaries: int, sites: int, *, confidence: float) -> float:
    """The best proven bound of a run without noise, the drawn canaries standing out and the others all alike.

    A canary that took part was never drawn with probability (1 - q)^T; of those never drawn nothing is heard.
    """
    never = (1 - plan.mechanism.sampling_probability) ** plan.mechanism.steps
    quiet = (1 + never) / 2  # share of canaries of which nothing is heard
    counts = []
    for rule in GUESS_RULES:
        into, out = rule.halves(canaries)
        loud = min(into, (1 - quiet) * canaries)  # called `in` for what was heard; beyond them it is a toss
        right = loud + (into - loud) * never / (1 + never) + out / (1 + never)
        counts.append(Guesses(rule=rule, guesses=(into + out) * sites, correct=round(right * sites)))
    bounds = one_run_bounds(canaries * sites, counts, delta=plan.delta, confidence=confidence)
    return max(bound.value.value for bound in bounds.proven)
