"""How useful synthetic scans are under differential privacy: train a segmenter on them, test it on real patients.

Three hospitals of about 46 patients each hold some out, as sites always do, and train one generator together by the
campaign's own functions: public start, enrolment, warm-up release, rounds through the in-process Grid. This is done at
every epsilon of the published curve, with and without the public start, and each time from several seeds. Then
segmenters of equal training steps are tested on the same held-out patients:

- `consilium`: trained on the generator's volumes;
- `train-on-real`: trained on the members of all three hospitals together, which no hospital alone could do;
- `train-on-phantom`: trained on public phantoms, which needs no hospital;
- `public start alone`: trained on volumes of the generator that every hospital starts from.

`dice`: mean over labels, a patient's scans, held-out patients and seeds; a seed draws hold-outs, public start, every
hospital's randomness and the segmenter. low, high: 95 % bootstrap over seeds and, within a seed, over held-out
patients, the same draws for every row, so that ratios are paired. What was measured is kept in the cache, so that a
run that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from common.generator.network import generator_from
from common.generator.sampling import sample_pairs
from common.generator.weights import Weights
from common.measure.segmentation import dice_per_patient, train_segmenter
from common.phantom.draw import public_phantoms
from common.settings.load import study_digest
from common.settings.study import Study
from server.round import hold_rounds
from server.seeds import derive
from server.simulated_sites import Cohorts
from tests.benchmarks.hospitals import (
    cohorts_of,
    each,
    enrolled_run,
    public_start,
    say,
    source_digest,
    training_of,
    warmed_up,
)
from tests.benchmarks.options import DATA_VARIABLE, HIPPOCAMPUS, Options, data_folder, hippocampus
from tests.benchmarks.report import OURS, Curve, Row, bootstrap_draws, bounds
from tests.benchmarks.studies import HIPPOCAMPUS_STUDIES, QUICK_PATIENTS, TOF_MRA_STUDIES, StudyPair, shipped

SITES = 3
PHANTOM_PATIENTS = 46  # a site's, as many as there are real ones
CURVE = (1.0, 3.0, 5.0, 7.4, None)  # epsilon of training and warm-up release for each patient; None is no noise
QUICK_CURVE = (7.4, None)
COLD_ROUNDS = 8  # times the study's, from a random start
PAPER_EPSILON = 7.4  # where the published system, which counts patches, keeps 0.89 of its Dice without privacy
REAL, PHANTOM, START = PEERS = ("train-on-real", "train-on-phantom", "public start alone")

Pairs = NDArray[np.floating]
Dice = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One segmenter: trained on what `method` says, tested on the held-out patients of `seed`.

    data: folder of scans shared out by patient; None gives each hospital `phantoms` phantom patients.
    """

    case: str
    method: str
    study: Study
    seed: int
    data: Path | None
    phantoms: int
    cache: Path

    @property
    def stored(self) -> Path:
        """Where the result is kept; a change of the study or of any code that matters gives another name."""
        facts = [self.method, study_digest(self.study), self.seed, str(self.data), self.phantoms, source_digest()]
        return self.cache / f"dice-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.npy"


def run(options: Options) -> list[Row]:
    """Measure every case; the rows of one case stand together."""
    if options.cache is not None:
        return _run(options, options.cache)
    with TemporaryDirectory(prefix="consilium-bench-") as temporary:
        return _run(options, Path(temporary))


def _run(options: Options, cache: Path) -> list[Row]:
    cache.mkdir(parents=True, exist_ok=True)
    curve = QUICK_CURVE if options.quick else CURVE
    cases = [case for case in _cases(options, cache) if options.wants(case.name)]
    jobs = {key: job for case in cases for key, job in case.jobs(curve, options.seeds)}
    waiting = [job for job in jobs.values() if not job.stored.exists()]
    say(f"utility: {len(jobs)} segmenters, {len(waiting)} of them to be trained")
    for job, mean in zip(waiting, each(waiting, measure, in_one_process=options.quick), strict=True):
        say(f"  {job.case}, {job.method}, seed {job.seed}: Dice {mean:.4f}")
    dice = {key: np.load(job.stored) for key, job in jobs.items()}
    return [row for name in dict.fromkeys(key.case for key in jobs) for row in _rows(name, dice, curve, options.seeds)]


def measure(job: Job) -> float:
    """Do the job and store the (patients,) Dice of its held-out patients; returns their mean."""
    with TemporaryDirectory(prefix="consilium-bench-") as temporary:
        federation = Federation.of(job, Path(temporary) / "run")
        study = job.study
        segmenter = train_segmenter(
            federation.training_pairs(job.method),
            labels=len(study.labels),
            steps=study.utility.training_steps,
            seed=job.seed,
        )
        by_scan = dice_per_patient(segmenter, federation.heldout, labels=len(study.labels)).mean(axis=1)
    patients = federation.patients
    dice = np.bincount(patients, weights=by_scan) / np.bincount(patients)
    partial = job.stored.with_suffix(f".{os.getpid()}.npy")
    np.save(partial, dice)
    partial.replace(job.stored)
    return float(dice.mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """The hospitals of one job.

    start: the public generator. trained: the generator after the last round, None where the method needs none.
    members, heldout: (N, 1+K, D, H, W) float16, every scan of every such patient. patients: whose scan each row of
    `heldout` is, as 0, 1, ...
    """

    study: Study
    seed: int
    start: Weights
    trained: Weights | None
    members: Pairs
    heldout: Pairs
    patients: NDArray[np.int64]

    @classmethod
    def of(cls, job: Job, folder: Path) -> Federation:
        """Enrol the hospitals, and train where the method asks for it."""
        public = public_start(job.study, seed=job.seed, cache=job.cache)
        source = Cohorts(folder=job.data, sites=SITES, phantoms=job.phantoms)
        run = enrolled_run(job.study, source, folder, seed=job.seed, public=public)
        trained = None
        if job.method.startswith(OURS):
            trained = hold_rounds(training_of(run), warmed_up(run, public)).average
        cohorts = cohorts_of(run).values()
        heldout = [cohort.scans(patient) for cohort in cohorts for patient in cohort.nonmembers]
        return cls(
            study=job.study,
            seed=job.seed,
            start=public.generator,
            trained=trained,
            members=np.concatenate([cohort.scans(patient) for cohort in cohorts for patient in cohort.members]),
            heldout=np.concatenate(heldout),
            patients=np.repeat(np.arange(len(heldout)), [len(scans) for scans in heldout]),
        )

    def training_pairs(self, method: str) -> Pairs:
        """What the segmenter of `method` is trained on."""
        volumes = self.study.utility.volumes
        if method == REAL:
            return self.members
        if method == PHANTOM:
            return public_phantoms(self.study, derive(self.seed, "utility phantoms"), volumes)
        generator = generator_from(self.study, self.trained or self.start)
        return sample_pairs(generator, seed=derive(self.seed, "utility"), first=0, count=volumes)


# --- cases and their jobs --------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """Which curve a result belongs to. epsilon, warm: of our generators; None and True for the peers."""

    case: str
    method: str
    epsilon: float | None
    warm: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of scans: the private study, the research study without noise, and where patients come from."""

    name: str
    private: Study
    research: Study
    data: Path | None
    phantoms: int
    cache: Path

    def jobs(self, curve: Sequence[float | None], seeds: int) -> Iterator[tuple[Key, Job]]:
        """Peers once a seed, ours at every epsilon with and without the public start."""
        for seed in range(seeds):
            for method in PEERS:
                yield Key(self.name, method, None, True, seed), self._job(method, self.private, seed)
            for warm in (True, False):
                for epsilon in curve:
                    yield Key(self.name, OURS, epsilon, warm, seed), self._job(OURS, self._study(epsilon, warm), seed)

    def _job(self, method: str, study: Study, seed: int) -> Job:
        return Job(
            case=f"{self.name}, {study.study}",
            method=method,
            study=study,
            seed=seed,
            data=self.data,
            phantoms=self.phantoms,
            cache=self.cache,
        )

    def _study(self, epsilon: float | None, warm: bool) -> Study:
        """The study at this epsilon; without the public start both networks begin at random, with no warm-up.

        A random start then gets more critic steps than the shipped study, which leaves nearly all to its warm-up.
        """
        study = self.research if epsilon is None else self.private
        privacy = study.privacy.model_copy(update={"target_epsilon": epsilon, "epsilon_cap": 20.0})
        name = f"{study.study}-{'no-noise' if epsilon is None else f'{epsilon:g}'.replace('.', 'p')}"
        if warm:
            return study.model_copy(update={"study": name, "privacy": privacy})
        training = study.training
        if epsilon is not None:
            training = training.model_copy(update={"rounds": COLD_ROUNDS * training.rounds})
        cold = study.warm_start.model_copy(update={"steps": 0})
        return study.model_copy(
            update={
                "study": f"{name}-cold",
                "privacy": privacy,
                "training": training,
                "warm_start": cold,
                "warm_up": None,
            }
        )


def _cases(options: Options, cache: Path) -> list[Case]:
    patients = QUICK_PATIENTS if options.quick else PHANTOM_PATIENTS
    data = None if options.quick else hippocampus()
    if data is None:
        say(
            "utility: phantoms only, in place of real scans: they were not asked for, or "
            f"{data_folder() / HIPPOCAMPUS} is absent ({DATA_VARIABLE} names another folder)"
        )

    def case(name: str, pair: StudyPair, folder: Path | None) -> Case:
        private, research = (shipped(file, folder=options.studies, quick=options.quick) for file in pair)
        shape = "x".join(map(str, private.grid.shape))
        return Case(
            name=f"{name}, {shape}, {SITES} sites",
            private=private,
            research=research,
            data=folder,
            phantoms=patients,
            cache=cache,
        )

    whose = "hippocampus MRI" if data else "hippocampus phantoms in place of real scans"
    return [case(whose, HIPPOCAMPUS_STUDIES, data), case("TOF-MRA phantoms", TOF_MRA_STUDIES, None)]


# --- rows --------------------------------------------------------------------------------------------


def _rows(case: str, dice: Mapping[Key, Dice], curve: Sequence[float | None], seeds: int) -> list[Row]:
    """The curve, the peers, then what privacy costs and what it is compared with."""

    def of(method: str, epsilon: float | None = None, warm: bool = True) -> Curve:
        key = Key(case, method, epsilon, warm, 0)
        return Curve(name=f"{case}, {_words(epsilon, warm)}", dice=[dice[replace(key, seed=s)] for s in range(seeds)])

    draws = bootstrap_draws([len(values) for values in of(REAL).dice])
    patients = sum(len(values) for values in of(REAL).dice)

    def row(curve: Curve, metric: str, *, method: str = OURS, against: Curve | None = None, ratio: bool = False) -> Row:
        value, spread = curve.mean, curve.spread(draws)
        if against is not None:
            other = against.spread(draws)
            value = value / against.mean if ratio else value - against.mean
            spread = spread / other if ratio else spread - other
        low, high = bounds(spread)
        name = curve.name if method == OURS else case
        unit = "ratio" if ratio else "dice"
        return Row(case=name, method=method, metric=metric, value=value, low=low, high=high, unit=unit, n=patients)

    rows = [row(of(OURS, epsilon, warm), "dice") for warm in (True, False) for epsilon in curve]
    rows += [row(of(method), "dice", method=method) for method in PEERS]
    for warm in (True, False):
        for epsilon in (e for e in curve if e is not None):
            none = of(OURS, None, warm)
            rows.append(row(of(OURS, epsilon, warm), f"dice_ratio_eps{epsilon:g}", against=none, ratio=True))
    for epsilon in (PAPER_EPSILON, None):
        rows += [row(of(OURS, epsilon), f"dice_minus_{peer.replace(' ', '-')}", against=of(peer)) for peer in PEERS]
    return rows


def _words(epsilon: float | None, warm: bool) -> str:
    return f"{'no DP' if epsilon is None else f'epsilon {epsilon:g}'}, {'public start' if warm else 'random start'}"
