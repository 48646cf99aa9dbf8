"""PET with its critic, its generator and its segmenters watched: with and without privacy, in whole campaigns.

Three hospitals hold the open FDG-PET of soft-tissue sarcomas, each the patients of one voxel size. Those are few, so an
attack's interval is wide and its control says little: another three hold forty phantom patients each, drawn by the same
statistics, and they alone are measured where the scans are absent. `consilium simulate` runs the research study
`pet-trgan-research`, whose course answers exactly, once without noise and once with a patient-level epsilon of 8, from
every seed:

- `critic_auc_nonprivate`, `critic_auc_eps8`: of each hospital's own critic, members against held-out patients; pooled
  over hospitals by patients. `critic_auc_control_...`: the same score between halves of the members, where there is
  nothing to find. No critic leaves.
- `generator_auc_...`, `generator_auc_control_...`: near copies and nearest volume from the generator that would leave.
- `dice`: of a segmenter on held-out patients; trained on the last round's volumes (`consilium`), on the members of
  all hospitals together (`train-on-real`, which no hospital could do), on phantoms alone (`train-on-phantom`), or on
  volumes of the public start. Equal steps, equal augmentation, means of two segmenters. `dice_ratio_to_real`: beside
  `train-on-real`, paired.
- `course_share`: what the points add to the wall time of the rest of the campaign, audit and utility included.

Attacks: value and interval are means over seeds of the campaign's own estimates; a patient is in every seed, so the
interval is that of one seed. Dice: 95 % bootstrap over seeds and held-out patients. n: held-out patients of all seeds
for Dice, else seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from client.cohort import Cohort
from common.generator.network import generator_from, read_weights
from common.generator.sampling import sample_pairs
from common.measure.intervals import Interval
from common.measure.segmentation import dice_per_patient, train_segmenter
from common.phantom.draw import public_phantoms
from common.settings.load import study_digest
from common.settings.study import Study
from common.telemetry.events import ignore
from server.checkpoint import CheckpointStore
from server.course import CourseRow
from server.course_stage import read_course
from server.run_folder import Engine, RunFolder
from server.seeds import derive
from server.simulate import simulate
from server.simulated_sites import Cohorts
from tests.benchmarks.hospitals import cohorts_of, each, say, utc_now
from tests.benchmarks.options import DATA_VARIABLE, Options, pet
from tests.benchmarks.report import OURS, Curve, Row, bootstrap_draws, bounds
from tests.benchmarks.studies import shipped

STUDY = "pet-trgan-research.yaml"
SITES = 3
EPSILONS = (None, 8.0)
SEGMENTERS, SEGMENTER_STEPS, VOLUMES = 2, 400, 512
REAL, PHANTOM, START = PEERS = ("train-on-real", "train-on-phantom", "public start alone")

Dice = NDArray[np.float64]


@dataclass(frozen=True)
class Whose:
    """Patients of the hospitals, in words and as `consilium simulate` takes them."""

    name: str
    cohorts: Cohorts


PHANTOMS = Whose("PET phantoms", Cohorts(folder=None, sites=SITES, phantoms=40))
FEW_PHANTOMS = Whose("few PET phantoms", Cohorts(folder=None, sites=SITES, phantoms=12))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One campaign. steps, volumes: of each segmenter."""

    study: Study
    seed: int
    whose: Whose
    folder: Path
    steps: int
    volumes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What one campaign showed. last: its last point. share: of the course. dice: (held-out patients,) by method."""

    last: CourseRow
    share: float
    dice: Mapping[str, Dice]


def run(options: Options) -> list[Row]:
    """Run every campaign; rows of one epsilon stand together."""
    everybody = [FEW_PHANTOMS] if options.quick else [PHANTOMS]
    data = None if options.quick else pet()
    if data is not None:
        everybody.insert(0, Whose("PET of sarcomas", Cohorts(folder=data, sites=SITES, phantoms=0)))
    elif not options.quick:
        say(f"course: phantoms alone, without real PET ({DATA_VARIABLE} names the folder that holds pet/ibsi_sts)")
    study = shipped(STUDY, folder=options.studies, quick=options.quick)
    study = _quick(study) if options.quick else study
    shape = "x".join(map(str, study.grid.shape))
    cases = {
        f"{whose.name}, {shape}, {SITES} sites, {'no DP' if epsilon is None else f'epsilon {epsilon:g}'}": (
            whose,
            epsilon,
        )
        for whose in everybody
        for epsilon in EPSILONS
    }
    with TemporaryDirectory(prefix="consilium-bench-") as temporary:
        jobs = {
            (case, seed): Job(
                study=_at(study, epsilon),
                seed=seed,
                whose=whose,
                folder=Path(temporary) / f"{number}-{seed}",
                steps=4 if options.quick else SEGMENTER_STEPS,
                volumes=16 if options.quick else VOLUMES,
            )
            for number, (case, (whose, epsilon)) in enumerate(cases.items())
            if options.wants(case)
            for seed in range(options.seeds)
        }
        found = dict(zip(jobs, each(list(jobs.values()), measure, in_one_process=options.quick), strict=True))
    return [
        row
        for case, (_, epsilon) in cases.items()
        if options.wants(case)
        for row in _rows(
            case,
            "nonprivate" if epsilon is None else f"eps{epsilon:g}",
            [found[case, seed] for seed in range(options.seeds)],
        )
    ]


def _quick(study: Study) -> Study:
    course = study.course
    if course is None:
        raise ValueError(f"{STUDY} follows no course")
    return study.model_copy(
        update={
            "course": course.model_copy(update={"every_rounds": 1, "volumes": 16, "training_steps": 2}),
            "training": study.training.model_copy(update={"latent_size": 32}),  # 23 numbers are the lesion's
            "audit": study.audit.model_copy(update={"volumes": 40}),
            "release": study.release.model_copy(update={"volumes": 16}),
        }
    )


def _at(study: Study, epsilon: float | None) -> Study:
    """The study with this epsilon and nothing else changed."""
    name = f"{study.study}-{'no-noise' if epsilon is None else f'{epsilon:g}'}"
    privacy = study.privacy.model_copy(update={"target_epsilon": epsilon})
    return study.model_copy(update={"study": name, "privacy": privacy})


def measure(job: Job) -> Found:
    """Run one campaign and look at it."""
    say(f"course: {job.whose.name}, {job.study.study}, seed {job.seed}")
    finished = simulate(
        job.study, job.folder, job.whose.cohorts, engine=Engine.LOCAL, seed=job.seed, observer=ignore, now=utc_now
    )
    course = read_course(finished)
    if course is None or not course.measured:
        raise ValueError(f"the campaign of {job.study.study} has no point")
    spent = sum(row.seconds for row in course.rows)
    return Found(last=course.measured[-1], share=spent / (_seconds(finished) - spent), dice=_dice(job, finished))


def _seconds(finished: RunFolder) -> float:
    """Wall time of all stages."""
    events = map(json.loads, finished.events.read_text(encoding="utf-8").splitlines())
    return sum(float(event["seconds"]) for event in events if event["event"] == "StageFinished")


def _dice(job: Job, finished: RunFolder) -> dict[str, Dice]:
    """Of every method on the held-out patients of all hospitals."""
    study = job.study
    cohorts = list(cohorts_of(finished).values())
    members = np.concatenate([cohort.scans(name) for cohort in cohorts for name in cohort.members])
    last = CheckpointStore(finished.checkpoints, study_digest=study_digest(study)).latest()
    if last is None:
        raise ValueError(f"{finished.path} holds no round")

    def drawn(name: str) -> NDArray[np.floating]:
        weights = last.average if name == OURS else read_weights(finished.warm_start / "generator.safetensors")
        seed = derive(job.seed, "bench volumes")
        return sample_pairs(generator_from(study, weights), seed=seed, first=0, count=job.volumes)

    pairs: dict[str, Callable[[], NDArray[np.floating]]] = {
        OURS: lambda: drawn(OURS),
        REAL: lambda: members,
        PHANTOM: lambda: public_phantoms(study, derive(job.seed, "bench phantoms"), job.volumes),
        START: lambda: drawn(START),
    }
    return {name: _mean_dice(job, make(), cohorts) for name, make in pairs.items()}


def _mean_dice(job: Job, pairs: NDArray[np.floating], cohorts: Sequence[Cohort]) -> Dice:
    """(held-out patients,): means over segmenters, because one of them alone moves by a few hundredths."""
    labels = len(job.study.labels)
    each_segmenter = []
    for number in range(SEGMENTERS):
        seed = derive(job.seed, f"bench segmenter {number}")
        segmenter = train_segmenter(pairs, labels=labels, steps=job.steps, seed=seed)
        each_segmenter.append(
            [
                dice_per_patient(segmenter, cohort.scans(patient), labels=labels).mean()
                for cohort in cohorts
                for patient in cohort.nonmembers
            ]
        )
    return np.mean(each_segmenter, axis=0, dtype=np.float64)


# --- rows ----------------------------------------------------------------------------------------------------------


def _rows(case: str, privacy: str, seeds: Sequence[Found]) -> list[Row]:
    """All of one epsilon. privacy: as it ends the names of the attacks' metrics."""
    bare = Row(case=case, method=OURS, metric="", value=0.0, low=None, high=None, unit="auc", n=0)
    attacks: Mapping[str, Callable[[CourseRow], Interval | None]] = {
        f"critic_auc_{privacy}": lambda row: row.point.critic_attack if row.point else None,
        f"critic_auc_control_{privacy}": lambda row: row.critic_control,
        f"generator_auc_{privacy}": lambda row: row.point.generator_attack if row.point and row.attacked else None,
        f"generator_auc_control_{privacy}": lambda row: row.generator_control,
    }
    rows = []
    for metric, of in attacks.items():
        known = [interval for found in seeds if (interval := of(found.last)) is not None]
        if known:
            low, value, high = (fmean(getattr(i, end) for i in known) for end in ("low", "estimate", "high"))
            rows.append(replace(bare, metric=metric, value=value, low=low, high=high, n=len(known)))
    curves = {method: Curve(name=case, dice=[found.dice[method] for found in seeds]) for method in (OURS, *PEERS)}
    draws = bootstrap_draws([len(values) for values in curves[REAL].dice])
    dice = replace(bare, metric="dice", unit="dice", n=sum(len(values) for values in curves[REAL].dice))
    for method, curve in curves.items():
        low, high = bounds(curve.spread(draws))
        rows.append(replace(dice, method=method, value=curve.mean, low=low, high=high))
    real = curves[REAL]
    for method in (OURS, PHANTOM, START):
        low, high = bounds(curves[method].spread(draws) / real.spread(draws))
        ratio = replace(dice, method=method, metric="dice_ratio_to_real", unit="ratio", low=low, high=high)
        rows.append(replace(ratio, value=curves[method].mean / real.mean))
    shares = [found.share for found in seeds]
    share = replace(bare, metric="course_share", value=fmean(shares), low=min(shares), high=max(shares))
    return [*rows, replace(share, unit="ratio", n=len(shares))]
