"""What a site's ledger tells the hospital: history, what is spent, what is left, what a study would cost.

Computed from the stored mechanisms with the rule that reservations are granted by. Nothing is spent here; a file of an
older schema is upgraded when it is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, assert_never

from client.budget import Budget
from client.orders import COURSE_QUESTION, course_epsilon, course_key, study_of
from client.site_folder import LEDGER_FILE, POLICY_FILE
from client.store import SiteStore
from common.errors import IntegrityError, LedgerError, UsageError
from common.measure.audit_plan import make_plan
from common.privacy.accounting import Epsilon, epsilon, epsilon_rdp
from common.privacy.calibration import plan_of
from common.privacy.ledger import Cap, Ledger, above_cap, without_noise
from common.privacy.ledger_rows import Cohort, LedgerEntry
from common.privacy.ledger_witness import is_countersigned
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, Mechanism, NoisedCounts
from common.protocol.messages import LedgerHead, SegmenterSource
from common.settings.load import load_study, study_digest
from common.settings.site import load_policy, load_site
from common.settings.study import Study

MOST: Final = 1000  # more of the same than this is not counted
UTILITY_QUESTIONS: Final = (SegmenterSource.SYNTHETIC, SegmenterSource.PHANTOM)  # what a real campaign asks about


@dataclass(frozen=True, kw_only=True)
class More:
    """How often the cap still allows one more round, or answer, like the last. times: MOST stands for MOST or more."""

    mechanism: Mechanism
    times: int


@dataclass(frozen=True, kw_only=True)
class CohortBudget:
    """What a patient of one cohort of one study has spent at most, over all studies.

    capped: what the cap is compared with; in a research simulation that leaves out what has no noise at all.
    second_opinion: an upper bound on `epsilon` by Renyi divergences. more: None where nothing has noise.
    """

    study: str
    cohort: Cohort
    epsilon: Epsilon
    capped: Epsilon
    second_opinion: float
    cap: Cap
    more: More | None

    @property
    def remaining(self) -> float:
        """Epsilon between what is proven and the cap; composition makes it worth more than it looks."""
        return max(self.cap.epsilon - self.capped.upper, 0.0)


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """What each cohort would have spent after the whole plan of a study. above: epsilon by cohort the cap forbids."""

    study: str
    name: str
    cohorts: tuple[CohortBudget, ...]
    above: Mapping[Cohort, float]

    @property
    def allowed(self) -> bool:
        """Whether the caps of site and study allow all of it."""
        return not self.above


@dataclass(frozen=True, kw_only=True)
class LedgerReport:
    """Everything that `consilium site ledger` shows. names: of the studies whose enrolment can be read, by digest."""

    site: str
    head: LedgerHead
    entries: tuple[LedgerEntry, ...]
    budgets: tuple[CohortBudget, ...]
    names: Mapping[str, str]
    what_if: WhatIf | None


def read_report(site_file: Path, *, what_if: Path | None, verify: bool, noted: LedgerHead | None) -> LedgerReport:
    """Read a site's ledger without changing it.

    what_if: a study file. verify: compare with every witness that the site kept. noted: a head to look for.
    Raises UsageError when there is no ledger, LedgerError when it, or a head, does not hold, SettingsError.
    """
    settings, folder = load_site(site_file), site_file.resolve().parent
    policy, store = load_policy(folder / POLICY_FILE), SiteStore(Path(settings.state))
    path = folder / LEDGER_FILE
    if not path.exists():
        if _witnessed_heads(store):
            raise LedgerError(
                f"the ledger {path} is missing, and this site has spent from it: restore the newest copy."
            )
        raise UsageError(f"{settings.site} has no ledger yet ({path}): it has spent nothing.")
    budget = Budget(settings, policy, store, ledger_file=path, now=lambda: datetime.now(UTC))
    ledger = budget.ledger if budget.has_key else Ledger(path)  # without the key: read, not bound to this site
    studies = _readable_studies(store)
    with ledger.held():
        if verify:
            ledger.verify(*_witnessed_heads(store))
        if noted is not None:
            ledger.verify(noted)
        asked = None if what_if is None else load_study(what_if)
        return LedgerReport(
            site=settings.site,
            head=ledger.head,
            entries=ledger.entries(),
            budgets=budgets(ledger, lambda digest: budget.cap(studies.get(digest))),
            names={digest: study.study for digest, study in studies.items()},
            what_if=None if asked is None else what_if_of(ledger, asked, budget.cap(asked)),
        )


def _readable_studies(store: SiteStore) -> dict[str, Study]:
    """Studies by digest; one that another version of the protocol enrolled in keeps its digest for a name."""
    found = {}
    for digest, study in store.studies().items():
        with suppress(IntegrityError):
            found[digest] = study_of(study.enrolment())
    return found


def _witnessed_heads(store: SiteStore) -> list[LedgerHead]:
    """The site's own last head, and those countersigned. Raises LedgerError for one that no coordinator signed."""
    own = store.own_head()
    heads = [] if own is None else [own]
    for digest, study in store.studies().items():
        witness = study.witness()
        if witness is None:
            continue
        if not is_countersigned(witness, study=digest, key=study.enrolment().coordinator_key):
            raise LedgerError(
                f"the witness kept for study {digest[:12]} is not signed by its coordinator: it was changed after it "
                "was stored. Restore the state folder from its newest backup."
            )
        heads.append(witness.head)
    return heads


def budgets(ledger: Ledger, cap_of: Callable[[str], Cap]) -> tuple[CohortBudget, ...]:
    """One for each cohort of each study in the ledger, in the order of their first rows. cap_of: by study digest."""
    entries = ledger.entries()
    found = dict.fromkeys((entry.study, entry.cohort) for entry in entries)
    result = []
    for study, cohort in found:
        own = [
            e.mechanism for e in entries if (e.study, e.cohort) == (study, cohort) and not without_noise(e.mechanism)
        ]
        last = next(reversed([m for m in own if isinstance(m, DpSgd)] or own), None)
        result.append(_budget(study, cohort, ledger.spent_by(cohort, study), cap_of(study), last))
    return tuple(result)


def what_if_of(ledger: Ledger | None, study: Study, cap: Cap) -> WhatIf:
    """What the study's whole plan would cost here: warm-up, training, audit and utility answers.

    Of a study that has begun, only what is still to come is added: what a crash charged twice stays charged twice.
    ledger: None at a site that has spent nothing. Raises SettingsError when the plan's target cannot be met.
    """
    digest = study_digest(study)
    result, above = [], {}
    for cohort, planned in planned_charges(study).items():
        entries = () if ledger is None else ledger.entries(digest, cohort)
        spent = [] if ledger is None else ledger.spent_by(cohort, digest)
        to_come = Counter(planned) - Counter((e.key, e.mechanism) for e in entries if e.counts)
        mechanisms = [*spent, *(mechanism for _, mechanism in to_come.elements())]
        result.append(_budget(digest, cohort, mechanisms, cap, last=None))
        would = above_cap(mechanisms, cap)
        if would is not None:
            above[cohort] = would
    return WhatIf(study=digest, name=study.study, cohorts=tuple(result), above=above)


def planned_charges(study: Study) -> dict[Cohort, list[tuple[str, Mechanism]]]:
    """Key and mechanism of all that a campaign of this study reserves at a site, if nothing has to be repeated."""
    plan, audit = plan_of(study), make_plan(study)
    members: list[tuple[str, Mechanism]] = [] if plan.warm_up is None else [("warm-up", plan.warm_up)]
    members += [(f"round {number + 1}", plan.one_round) for number in range(plan.rounds)]
    members += [("score", mechanism) for mechanism in audit.member_mechanisms]
    nonmembers: list[tuple[str, Mechanism]] = [("score", mechanism) for mechanism in audit.nonmember_mechanisms]
    if study.course is not None:
        keys = [course_key(number) for number in study.course.rounds(plan.rounds)]
        cost = course_epsilon(study)
        if cost is None:
            exact = ExactAnswer(question=COURSE_QUESTION)
            members += [(key, exact) for key in keys]
            nonmembers += [(key, exact) for key in keys]
        else:
            nonmembers += [(key, NoisedCounts(epsilon=cost)) for key in keys]
    if study.utility.training_steps > 0:
        answer = NoisedCounts(epsilon=study.utility.epsilon_per_answer)
        nonmembers += [(f"utility {source.value}", answer) for source in UTILITY_QUESTIONS]
    return {Cohort.MEMBERS: members, Cohort.NONMEMBERS: nonmembers}


def how_many_more(spent: Sequence[Mechanism], one: Mechanism, cap: Cap) -> int:
    """How often `one` still fits under the cap, at most MOST."""

    def fits(times: int) -> bool:
        return above_cap([*spent, *[one] * times], cap) is None

    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def in_words(mechanism: Mechanism) -> str:
    """A mechanism for people who do not read mechanisms."""
    match mechanism:
        case DpSgd(noise_multiplier=noise, sampling_probability=probability, steps=steps):
            return f"{steps} training steps, each with about {probability:.0%} of the patients, {_noise(noise)}"
        case GaussianRelease(noise_multiplier=noise):
            return f"one sum over all patients, {_noise(noise)}"
        case NoisedCounts(epsilon=cost):
            return f"noised counts, epsilon {cost:g}"
        case ExactAnswer(question=question):
            return f"an exact answer ({question}), no privacy"
        case _:
            assert_never(mechanism)


def _noise(multiplier: float) -> str:
    return f"noise {multiplier:.2f} times one patient" if multiplier > 0 else "no noise, no privacy"


def _budget(
    study: str, cohort: Cohort, mechanisms: Sequence[Mechanism], cap: Cap, last: Mechanism | None
) -> CohortBudget:
    return CohortBudget(
        study=study,
        cohort=cohort,
        epsilon=epsilon(mechanisms, cap.delta),
        capped=epsilon([m for m in mechanisms if not (cap.research and without_noise(m))], cap.delta),
        second_opinion=epsilon_rdp(mechanisms, cap.delta),
        cap=cap,
        more=None if last is None else More(mechanism=last, times=how_many_more(mechanisms, last, cap)),
    )
