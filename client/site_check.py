"""Whether a study can be done with a hospital's own scans on its own machine: tried offline, before it joins.

(1) every scan is read and prepared as enrolment would, and each that cannot be used is named with its reason
(2) the patients are counted against what study and policy ask for, whoever the draw holds out
(3) a few training steps are taken on them, to be timed; what they make is thrown away
(4) the whole study is priced by the rule that orders are charged by

Nothing is spent, nothing is stored and nothing leaves: neither the ledger nor the state folder is written to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from client.approval import CohortCost, limit_objections, study_costs
from client.cohort import Cohort, draw_holdout
from client.ingest import IngestReport, ingest
from client.randomness import SecureStream
from client.site_folder import POLICY_FILE, SITE_FILE
from client.training.canaries import canaries_of
from client.training.clipping.memory import pass_memory
from client.training.compute import Compute
from client.training.loop import train_round
from client.training.state import GameState
from client.work import draw_phantoms
from common.errors import SettingsError
from common.generator.network import build_generator, weights_of
from common.privacy.mechanism import DpSgd, Plan
from common.settings.load import load_study, study_digest
from common.settings.site import PhantomSource, SitePolicy, SiteSettings, load_policy, load_site
from common.settings.study import AttackName, Study
from common.telemetry.events import Event, Observer, Progress, ignore

STEPS: Final = 3  # of which the first also warms up and is not counted
LONG_ODDS: Final = 0.01  # a draw that leaves too few patients to train on more often than this is a problem
_MIB: Final = 2**20
_CUT_OFF: Final = 0.95  # as in the ingest report
_COMPARED: Final = frozenset({AttackName.DENSITY_RATIO, AttackName.SUBSTITUTE})


@dataclass(frozen=True, kw_only=True)
class Patients:
    """How many there are, and how many there must be.

    least: in all; least_members: to train on. expected_members: of so many, on average. chance_of_too_few: that the
    draw of the held-out leaves fewer than least_members to train on.
    """

    count: int
    least: int
    least_members: int
    expected_members: float
    chance_of_too_few: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a training step takes here. seconds: of one; memory in MiB, beside the networks.

    drawn: patients of a step, at most, but for one in a thousand; at_once: of them in one pass. cohort_mib: the
    prepared scans, which lie in memory while a round is trained.
    """

    seconds: float
    steps_per_round: int
    rounds: int
    drawn: int
    at_once: int
    pass_mib: float
    cohort_mib: float
    allowed_mib: int

    @property
    def round_s(self) -> float:
        """Training of one round, in seconds."""
        return self.seconds * self.steps_per_round


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteCheck:
    """Everything that was found out. report: None for phantoms. step: None where too few patients are there for one."""

    study: Study
    digest: str
    approved: bool
    report: IngestReport | None
    patients: Patients
    step: StepCost | None
    costs: tuple[CohortCost, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the site could take part."""
        return not self.problems


def check_site(folder: Path, study_file: Path, *, now: datetime, observer: Observer = ignore) -> SiteCheck:
    """Steps (1) to (4). now: aware. Raises SettingsError for a file that is wrong, DataError when no scan is usable."""
    site, policy, study = load_site(folder / SITE_FILE), load_policy(folder / POLICY_FILE), load_study(study_file)
    scans, report = _scans(site, study, observer)  # (1)
    patients = count_patients(len(scans), study, policy)  # (2)
    problems = list(_problems(patients, study, site))
    step = None
    try:
        step = measure_step(scans, study, site, observer)  # (3)
    except SettingsError as error:
        problems.append(str(error))
    costs = study_costs(folder, policy, study)  # (4)
    named = policy.model_copy(update={"purposes": (*policy.purposes, study.purpose)})  # approving adds it
    problems += limit_objections(named, study, costs, now)
    digest = study_digest(study)
    approved = policy.approval(digest) is not None
    return SiteCheck(
        study=study,
        digest=digest,
        approved=approved,
        report=report,
        patients=patients,
        step=step,
        costs=costs,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(_notes(report, site, approved=approved)),
    )


def count_patients(count: int, study: Study, policy: SitePolicy) -> Patients:
    """What the draw of the held-out leaves of so many patients. The draw itself is made once, at enrolment."""
    keep = 1 - study.audit.holdout_fraction
    return Patients(
        count=count,
        least=max(study.federation.minimum_patients, policy.minimum_patients),
        least_members=policy.minimum_patients,
        expected_members=count * keep,
        chance_of_too_few=float(binom.cdf(policy.minimum_patients - 1, count, keep)),
    )


def measure_step(
    scans: Mapping[str, NDArray[np.float16]], study: Study, site: SiteSettings, observer: Observer = ignore
) -> StepCost:
    """Take a few steps as a round would, with randomness and networks of their own, and throw away what they made.

    Raises SettingsError when not even one patient fits into the memory that site.yaml allows.
    """
    stream = SecureStream.from_entropy()
    split = draw_holdout(sorted(scans), study.audit.holdout_fraction, stream)
    cohort = Cohort.from_patients(scans, split)
    compute = Compute(device=site.device, precision=site.precision, memory_mib=site.training_memory_mib)
    state = GameState.start(study, None, compute.device)
    needs = pass_memory(state.critic, cohort.pair_shape, views=study.training.views_per_patient)
    clock = _Clock(observer)
    train_round(
        study=study,
        plan=_few_steps(study),
        weights=weights_of(build_generator(study)),
        state=state,
        cohort=cohort,
        stream=stream.fork("steps"),
        observer=clock,
        canaries=canaries_of(study, state.critic, stream.fork("canaries")),
        task="steps",
        compute=compute,
    )
    members = round(len(scans) * (1 - study.audit.holdout_fraction))
    drawn = int(binom.ppf(0.999, members, study.privacy.sampling_probability))
    allowed = site.training_memory_mib * _MIB
    at_once = max(1, min(int((allowed - needs.fixed) // needs.each), drawn))
    return StepCost(
        seconds=clock.seconds,
        steps_per_round=study.training.critic_steps_per_round,
        rounds=study.training.rounds,
        drawn=drawn,
        at_once=at_once,
        pass_mib=(needs.fixed + needs.each * at_once) / _MIB,
        cohort_mib=sum(array.nbytes for array in scans.values()) / _MIB,
        allowed_mib=site.training_memory_mib,
    )


class _Clock:
    """Seconds of each step, the first left out. Final."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._ends: list[float] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._ends.append(time.monotonic())
        self._observer(event)

    @property
    def seconds(self) -> float:
        """Of one step, on average."""
        return (self._ends[-1] - self._ends[0]) / max(len(self._ends) - 1, 1)


def _few_steps(study: Study) -> Plan:
    """Steps with some noise, whose size changes no time; nothing that is made with it leaves this function's caller."""
    privacy = study.privacy
    return Plan(
        mechanism=DpSgd(noise_multiplier=1.0, sampling_probability=privacy.sampling_probability, steps=STEPS),
        clip_norm=privacy.clip_norm,
        divisor=privacy.sampling_probability * privacy.reference_patients,
        steps_per_round=STEPS,
        rounds=1,
        target_epsilon=privacy.target_epsilon or 1.0,
        delta=privacy.delta,
    )


def _scans(
    site: SiteSettings, study: Study, observer: Observer
) -> tuple[Mapping[str, NDArray[np.float16]], IngestReport | None]:
    if isinstance(site.data, PhantomSource):
        return draw_phantoms(site.data, study), None
    ingested = ingest(site.data, study, part=site.part, part_by=site.part_by, observer=observer)
    return ingested.patients, ingested.report


def _problems(patients: Patients, study: Study, site: SiteSettings) -> Iterator[str]:
    if patients.count < patients.least:
        yield f"{patients.count} usable patients are fewer than the {patients.least} that study and policy ask for"
    elif patients.chance_of_too_few > LONG_ODDS:
        yield (
            f"of {patients.count} patients about {patients.expected_members:.0f} will be trained on, and with a chance "
            f"of {patients.chance_of_too_few:.0%} fewer than the policy's {patients.least_members}"
        )
    if (needs := sorted(_COMPARED & set(study.audit.attacks))) and site.reference_set is None:
        yield f"the audit's attacks {', '.join(needs)} need a `reference_set` in site.yaml, and there is none"


def _notes(report: IngestReport | None, site: SiteSettings, *, approved: bool) -> Iterator[str]:
    if report is None:
        yield "these are phantoms, no patients"
    elif cut := sum(scan.label_on_grid < _CUT_OFF for scan in report.used):
        yield f"the study's grid cuts off labelled volume in {cut} of {len(report.used)} scans"
    if not approved:
        yield "the study is not approved: `consilium site approve`"
    if site.simulated:
        yield "this site's randomness is seeded: it is a simulation"
