"""What a data-protection officer reads before a study is approved, and the same as one JSON object."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any, Final

from client.approval import CohortCost, PolicyChange, Proposal
from client.ledger_report import UTILITY_QUESTIONS
from common.generator.network import build_generator
from common.measure.audit_plan import make_plan
from common.privacy.ledger_rows import Cohort
from common.settings.study import AttackName, Question, Strategy, Study

WIDTH: Final = 118
_COLUMN: Final = 14
_BYTES: Final = 4  # of a float32
_ATTACKS: Final = {
    AttackName.NEAR_COPY: "near copies",
    AttackName.NEAREST: "nearest volume",
    AttackName.INVERSION: "inversion of the generator",
    AttackName.DENSITY_RATIO: "density ratio",
    AttackName.SUBSTITUTE: "substitute classifier",
}
_QUESTIONS: Final = {
    Question.LABEL_SIZE: "can an attribute be guessed better for patients that were used",
    Question.BLIND: "do the two groups differ in what no generator can know",
    Question.CRITIC: "does this site's own critic give its patients away",
}


def summary(proposal: Proposal) -> str:
    """The whole proposal in plain words, for a terminal."""
    study = proposal.study
    blocks = [
        ("study", [f"{study.study}   {proposal.approval.digest}"]),
        ("purpose", [study.purpose]),
        ("coordinator", list(_coordinator(proposal))),
        ("asks for", list(asks(study))),
        ("leaves", list(leaves(study))),
        (
            "never leaves",
            ["scans, labels, names and dates, who took part or was held out, the critic, this site's logs"],
        ),
        ("promise", list(_promise(study))),
        ("budget", list(budget_lines(proposal.costs))),
        ("audit", list(_audit(study))),
        ("code", list(_code(proposal))),
        ("approved by", [f"{proposal.approval.approved_by}, {proposal.approval.approved_on.isoformat()} (UTC)"]),
        ("valid until", [f"{proposal.change.after.expires.isoformat()}, with the policy"]),
        ("note", list(proposal.notes)),
    ]
    return "\n".join(line for title, texts in blocks for line in block(title, texts))


def difference(change: PolicyChange) -> str:
    """What changes in policy.yaml, as a unified diff; empty when nothing does."""
    old, new = change.text.splitlines(), change.new_text.splitlines()
    return "\n".join(difflib.unified_diff(old, new, "policy.yaml", "policy.yaml as approved", lineterm="", n=2))


def as_object(proposal: Proposal, *, approved: bool) -> dict[str, Any]:
    """What --json prints. Infinite numbers are the text `infinite`: JSON has none."""
    study, approval = proposal.study, proposal.approval
    privacy = study.privacy
    return {
        "approved": approved,
        "study": study.study,
        "digest": approval.digest,
        "purpose": study.purpose,
        "coordinator_key": approval.coordinator_key,
        "federation": proposal.welcome.federation if proposal.welcome else None,
        "approved_by": approval.approved_by,
        "approved_on": approval.approved_on.isoformat(),
        "policy_expires": proposal.change.after.expires.isoformat(),
        "asks_for": list(asks(study)),
        "leaves": list(leaves(study)),
        "promise": {
            "target_epsilon": privacy.target_epsilon,
            "delta": privacy.delta,
            "rounds": study.training.rounds,
            "steps": study.training.rounds * study.training.critic_steps_per_round,
        },
        "budget": budget_objects(proposal.costs),
        "code_digest": proposal.code,
        "app_digest": proposal.app_digest,
        "objections": list(proposal.objections),
        "notes": list(proposal.notes),
        "diff": difference(proposal.change),
    }


def asks(study: Study) -> Iterator[str]:
    """What the study takes from the hospital: which scans, how often, from how many patients."""
    labels = ", ".join(study.labels.values())
    shape = " x ".join(map(str, study.grid.shape))
    spacing = " x ".join(f"{mm:g}" for mm in study.grid.spacing_mm)
    yield f"{study.modality} scans with the labels {labels}, brought to {shape} voxels of {spacing} mm"
    yield f"at least {study.federation.minimum_patients} patients; the policy may ask for more"
    training = study.training
    yield (
        f"{training.rounds} rounds of {training.critic_steps_per_round} training steps; each step looks at each "
        f"patient with a chance of {study.privacy.sampling_probability:.0%}"
    )
    if study.warm_up is not None:
        yield "before that, one sum of measurements over all patients that are trained on"


def leaves(study: Study) -> Iterator[str]:
    """Everything that leaves the hospital, and nothing else does."""
    plan, training = make_plan(study), study.training
    numbers = sum(p.numel() for p in build_generator(study).parameters())
    yield "once: digests of this policy and of the installed code, and a sealed commitment to who was held out"
    if study.warm_up is not None:
        yield f"once: {study.warm_up.features(len(study.labels))} sums over all trained-on patients, with noise"
    yield (
        f"{training.rounds} times: the generator, {numbers:,} numbers ({_BYTES * numbers / 2**20:.1f} MiB), made from "
        "sums over patients with noise"
    )
    if study.federation.strategy is Strategy.ENSEMBLE:
        yield (
            f"the last {study.federation.fine_tune_rounds} of these are of this hospital alone, not mixed with others "
            "before the next; what is released learns from them"
        )
    if study.course is not None:
        times = len(study.course.rounds(training.rounds))
        what = "how well a segmenter does on held-out patients, as sums"
        if study.course.exact:
            yield f"{times} times: {what}, and how like and how leaky the scans are, all WITHOUT NOISE"
        else:
            yield f"{times} times: {what} with noise"
    if study.audit.canaries > 0:
        yield f"once: how many of {study.audit.canaries} invented patients were recognised; about no real one"
    counts = sum(answer.bins * len(answer.groups) for answer in plan.answers.values())
    yield f"for the audit: {counts} counts of patients with noise" + (
        ", and one noised yes or no" if Question.CRITIC in plan.questions else ""
    )
    if study.utility.training_steps > 0:
        yield f"{len(UTILITY_QUESTIONS)} times: how well a segmenter does on held-out patients, as sums with noise"
    yield "at the end: what was spent, signed by this site"


def _coordinator(proposal: Proposal) -> Iterator[str]:
    yield f"key {proposal.approval.coordinator_key}"
    if proposal.welcome is None:
        yield "this site has not joined a federation: the key is the one that was given"
    else:
        yield f"{proposal.welcome.describe()}, which this site joined"


def _promise(study: Study) -> Iterator[str]:
    privacy, audit = study.privacy, make_plan(study)
    if privacy.target_epsilon is None:
        yield "NONE: the study trains without noise. Only a simulation on invented patients may do that."
        return
    yield (
        f"training: epsilon {privacy.target_epsilon:g} at delta {privacy.delta:g} for each patient, over all "
        f"{study.training.rounds} rounds"
    )
    if audit.epsilon_members is not None and audit.epsilon_nonmembers is not None:
        yield (
            f"audit: epsilon {audit.epsilon_members:g} more for a trained-on patient, {audit.epsilon_nonmembers:g} for "
            "a held-out one"
        )
    if study.course is not None and study.course.exact:
        yield "course: NO PRIVACY. Its answers have no noise; only a simulation may give them"
    elif study.course is not None:
        times = len(study.course.rounds(study.training.rounds))
        yield (
            f"course of training: epsilon {times * study.course.epsilon_per_answer:g} more for a held-out patient, "
            f"nothing for a trained-on one"
        )
    both = privacy.target_epsilon + (audit.epsilon_members or 0.0)
    yield (
        f"that is: whoever sees all of it can multiply the odds that a given patient was trained on by at most "
        f"{math.exp(min(both, _LARGEST_EXPONENT)):,.0f}, except with a chance of {privacy.delta:g}; smaller is safer, "
        "and 1 would be nothing learnt"
    )


_LARGEST_EXPONENT: Final = 20.0  # beyond it the number is not read but counted


def budget_objects(costs: tuple[CohortCost, ...]) -> list[dict[str, Any]]:
    """What each cohort has spent, would have, and may, for --json."""
    return [
        {
            "cohort": cost.cohort.value,
            "spent": _json_number(cost.before),
            "after_this_study": _json_number(cost.after),
            "cap": cost.cap.epsilon,
            "left": cost.left,
            "delta": cost.cap.delta,
            "allowed": cost.above is None,
        }
        for cost in costs
    ]


def budget_lines(costs: tuple[CohortCost, ...]) -> Iterator[str]:
    """The same in words."""
    for cost in costs:
        who = "trained on" if cost.cohort is Cohort.MEMBERS else "held out"
        fits = f"{cost.left:.2f} left" if cost.above is None else "ABOVE THE CAP"
        yield (
            f"{who:<10}  spent {_number(cost.before)}, with this study {_number(cost.after)} of at most "
            f"{cost.cap.epsilon:g}: {fits}"
        )
    if not costs:
        yield "not computed: the study has more steps than the policy allows"


def _audit(study: Study) -> Iterator[str]:
    audit, release = study.audit, study.release
    yield (
        f"{audit.holdout_fraction:.0%} of the patients are drawn and never trained on; attacks compare the two groups: "
        + ", ".join(_ATTACKS[name] for name in audit.attacks)
    )
    if audit.questions:
        yield "also asked: " + "; ".join(_QUESTIONS[question] for question in audit.questions)
    yield (
        f"released only if the attacks stay below AUC {release.max_auc:g} over all sites and {release.max_auc_site:g} "
        f"at each, and at most {release.max_tpr:.0%} are recognised at {audit.false_positive_rate:.0%} false alarms"
    )
    if release.unsafe_bypass:
        yield "the study allows handing out refused volumes, marked UNSAFE"


def _code(proposal: Proposal) -> Iterator[str]:
    yield f"installed  {proposal.code}"
    if proposal.app_digest is not None:
        yield f"app        {proposal.app_digest}"
    yield "other code, another app or one changed byte of the study is refused until it is approved anew"


def block(title: str, texts: Sequence[str]) -> Iterator[str]:
    """Lines of a terminal: the title once, and the texts beside it, each wrapped."""
    name = title
    for text in texts:
        for number, line in enumerate(wrap(text, WIDTH - _COLUMN, break_long_words=False) or [""]):
            yield f"{name:<{_COLUMN}}{'  ' if number else ''}{line}".rstrip()
            name = ""


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "infinite"


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else "infinite"
