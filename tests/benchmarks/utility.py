"""How useful synthetic scans are: train a segmenter on them, test it on real patients nobody trained on.

Three hospitals share the patients and hold some out, as sites always do. The same hospitals train one generator
without privacy and one with (the two study files), by the campaign's own functions: warm start, enrolment, rounds
through the in-process Grid. Then segmenters of equal training steps are tested on the same held-out patients:

- `consilium`: trained on the generators' volumes;
- `train-on-real`: trained on the members of all three hospitals together, which no hospital alone could do;
- `train-on-phantom`: trained on public phantoms, which needs no hospital.

`dice`: mean over labels, a patient's scans, segmenter seeds and patients. low, high: 95 % bootstrap over the held-out
patients, the same draws for every row, so that differences and ratios are paired. The interval does not
cover another training of the generator: one seed trains it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from common.errors import SettingsError
from common.generator.network import generator_from
from common.generator.sampling import sample_pairs
from common.generator.weights import Weights
from common.measure.segmentation import dice_per_patient, train_segmenter
from common.privacy.accounting import epsilon
from common.privacy.mechanism import Plan
from common.settings.study import Study
from common.telemetry.events import Observer, ignore
from server.pretrain import public_phantoms
from server.round import hold_rounds
from server.seeds import derive
from server.simulated_sites import Cohorts
from tests.benchmarks.hospitals import cohorts_of, enrolled_run, progress, public_start, say, training_of
from tests.benchmarks.options import DATA_VARIABLE, HIPPOCAMPUS, Options, data_folder, hippocampus
from tests.benchmarks.report import OURS, Row, bounds, resampled
from tests.benchmarks.studies import PRIVATE, QUICK_PATIENTS, RESEARCH, shipped

SITES = 3
SEED = 0  # of hold-outs, warm start and generators; segmenters have their own
PHANTOM_PATIENTS = 50  # a site's, where there are no real ones
REAL, PHANTOM, START = "train-on-real", "train-on-phantom", "public warm start alone"

Pairs = NDArray[np.floating]
Statistic = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedFederation:
    """A study's generator as the campaign would audit it, and the patients of all its hospitals.

    members, heldout: (N, 1+K, D, H, W) float16, every scan of every such patient. patients: whose scan each row of
    `heldout` is, as 0, 1, ...; training_patients: how many patients `members` are.
    start: the public generator that training began with.
    """

    study: Study
    plan: Plan
    generator: Weights
    start: Weights
    members: Pairs
    heldout: Pairs
    patients: NDArray[np.int64]
    training_patients: int

    def synthetic(self, weights: Weights | None = None) -> Pairs:
        """The volumes that the campaign's utility stage draws, of the trained generator or of `weights`."""
        generator = generator_from(self.study, weights or self.generator)
        return sample_pairs(generator, seed=derive(SEED, "utility"), first=0, count=self.study.utility.volumes)


def train_federation(
    study: Study,
    folder: Path,
    *,
    data: Path | None,
    phantoms: int = PHANTOM_PATIENTS,
    sites: int = SITES,
    seed: int = SEED,
    cache: Path | None = None,
    observer: Observer = ignore,
) -> TrainedFederation:
    """Warm start, enrolment and every round of a study, as `consilium simulate` holds them in the new folder `folder`.

    data: folder of scans shared out by patient; None gives each hospital `phantoms` phantom patients. Who is held
    out depends on `seed`, the patients and the study's hold-out fraction, on nothing else of the study.
    Raises UsageError and SettingsError as `consilium simulate` does.
    """
    public = public_start(study, seed=seed, cache=cache, observer=observer)
    source = Cohorts(folder=data, sites=sites, phantoms=phantoms)
    run = enrolled_run(study, source, folder, seed=seed, public=public, observer=observer)
    campaign = training_of(run, observer=observer)
    last = hold_rounds(campaign, public.generator)
    cohorts = cohorts_of(run).values()
    heldout = [cohort.scans(patient) for cohort in cohorts for patient in cohort.nonmembers]
    members = [cohort.scans(patient) for cohort in cohorts for patient in cohort.members]
    return TrainedFederation(
        study=study,
        plan=campaign.plan,
        generator=last.average,
        start=public.generator,
        members=np.concatenate(members),
        heldout=np.concatenate(heldout),
        patients=np.repeat(np.arange(len(heldout)), [len(scans) for scans in heldout]),
        training_patients=len(members),
    )


def dice_of_patients(
    pairs: Pairs, trained: TrainedFederation, *, seeds: int, observer: Observer = ignore
) -> NDArray[np.float64]:
    """(patients,) Dice of segmenters trained on `pairs`, tested on the held-out patients of `trained`.

    Mean over labels, over a patient's scans, and over segmenters of seeds 0 .. seeds-1.
    """
    study = trained.study
    labels = len(study.labels)
    by_scan = np.zeros(len(trained.heldout))
    for seed in range(seeds):
        segmenter = train_segmenter(
            pairs, labels=labels, steps=study.utility.training_steps, seed=seed, observer=observer
        )
        by_scan += dice_per_patient(segmenter, trained.heldout, labels=labels).mean(axis=1) / seeds
    scans = np.bincount(trained.patients)
    mean: NDArray[np.float64] = np.bincount(trained.patients, weights=by_scan) / scans
    return mean


def run(options: Options) -> list[Row]:
    """Train both studies, measure all methods. Raises SettingsError when the two studies cannot be compared."""
    data = None if options.quick else hippocampus()
    if data is None:
        say(
            "utility: phantoms only, in place of real scans: they were not asked for, or "
            f"{data_folder() / HIPPOCAMPUS} is absent ({DATA_VARIABLE} names another folder)"
        )
    observer = progress()
    studies = [shipped(name, folder=options.studies, quick=options.quick) for name in (RESEARCH, PRIVATE)]
    _comparable(*studies)
    trained = []
    with TemporaryDirectory(prefix="consilium-bench-") as temporary:
        for study in studies:
            say(f"utility: training {study.study}")
            trained.append(
                train_federation(
                    study,
                    Path(temporary) / study.study,
                    data=data,
                    phantoms=QUICK_PATIENTS if options.quick else PHANTOM_PATIENTS,
                    cache=options.cache,
                    observer=observer,
                )
            )
    research, private = trained
    if not np.array_equal(research.heldout, private.heldout):
        raise SettingsError("the two studies hold out other patients; nothing was measured. Prepare both alike.")
    dice = _measured(research, private, seeds=options.seeds, observer=observer)
    return _rows(_case(private, data, options.seeds), private, dice)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dice:
    """(patients,) Dice of each method on the same held-out patients."""

    research: NDArray[np.float64]
    private: NDArray[np.float64]
    real: NDArray[np.float64]
    phantom: NDArray[np.float64]
    start: NDArray[np.float64]


def _measured(research: TrainedFederation, private: TrainedFederation, *, seeds: int, observer: Observer) -> Dice:
    phantoms = public_phantoms(private.study, derive(SEED, "utility phantoms"), private.study.utility.volumes)

    def measure(what: str, pairs: Pairs) -> NDArray[np.float64]:
        values = dice_of_patients(pairs, private, seeds=seeds, observer=observer)
        say(f"utility: {what}: Dice {values.mean():.4f}")
        return values

    return Dice(
        real=measure(REAL, private.members),
        phantom=measure(PHANTOM, phantoms),
        start=measure(START, private.synthetic(private.start)),
        research=measure("synthetic, no DP", research.synthetic()),
        private=measure(f"synthetic, {_privacy(private.study)}", private.synthetic()),
    )


def _rows(case: str, private: TrainedFederation, dice: Dice) -> list[Row]:
    """Every method's Dice, then the differences that the targets are about, then what privacy costs."""
    ours = {f"{case}, no DP": dice.research, f"{case}, {_privacy(private.study)}": dice.private}
    n = len(dice.real)
    draws = resampled(n)

    def row(name: str, method: str, metric: str, unit: str, statistic: Statistic) -> Row:
        """statistic: (draws, patients) row indices -> (draws,) values."""
        low, high = bounds(statistic(draws))
        value = float(statistic(np.arange(n, dtype=np.int64)[None])[0])
        return Row(case=name, method=method, metric=metric, value=value, low=low, high=high, unit=unit, n=n)

    def mean(values: NDArray[np.float64]) -> Statistic:
        return lambda index: values[index].mean(axis=1)

    rows = [row(name, OURS, "dice", "dice", mean(values)) for name, values in ours.items()]
    rows.append(row(case, REAL, "dice", "dice", mean(dice.real)))
    rows.append(row(case, PHANTOM, "dice", "dice", mean(dice.phantom)))
    rows.append(row(case, START, "dice", "dice", mean(dice.start)))
    rows += [row(name, OURS, "dice_gap_to_real", "dice", mean(dice.real - values)) for name, values in ours.items()]
    rows += [
        row(name, OURS, "dice_gain_over_phantom", "dice", mean(values - dice.phantom)) for name, values in ours.items()
    ]
    target = private.study.privacy.target_epsilon
    rows.append(
        row(
            case,
            OURS,
            f"dice_ratio_eps{target:g}",
            "ratio",
            lambda index: dice.private[index].mean(axis=1) / dice.research[index].mean(axis=1),
        )
    )
    return [*rows, _epsilon_row(case, private)]


def _epsilon_row(case: str, private: TrainedFederation) -> Row:
    """What training has cost each patient of a site; low and high are the accountant's own bounds."""
    plan = private.plan
    spent = epsilon([plan.mechanism], plan.delta)
    return Row(
        case=f"{case}, {_privacy(private.study)}",
        method=OURS,
        metric="training_epsilon",
        value=spent.value,
        low=spent.lower,
        high=spent.upper,
        unit=f"epsilon at delta {plan.delta:g}",
        n=private.training_patients,
    )


def _comparable(research: Study, private: Study) -> None:
    """Raise SettingsError unless only privacy and training differ."""
    same = ("labels", "grid", "intensity", "utility")
    other = [name for name in same if getattr(research, name) != getattr(private, name)]
    if research.audit.holdout_fraction != private.audit.holdout_fraction:
        other.append("audit.holdout_fraction")
    if other:
        raise SettingsError(
            f"{research.study} and {private.study} differ in {', '.join(other)}: their Dice cannot be compared; "
            "nothing was measured. Make them equal."
        )
    if research.privacy.target_epsilon is not None or private.privacy.target_epsilon is None:
        raise SettingsError(
            f"privacy.target_epsilon must be null in {RESEARCH} and a number in {PRIVATE}; nothing was measured."
        )


def _case(trained: TrainedFederation, data: Path | None, seeds: int) -> str:
    study = trained.study
    shape = "x".join(map(str, study.grid.shape))
    heldout = int(trained.patients.max()) + 1
    whose = data.name if data else "phantoms in place of real scans"
    return (
        f"{whose}, {shape}, {SITES} sites, {trained.training_patients} patients to train on, {heldout} held out, "
        f"{study.utility.training_steps} segmenter steps, {seeds} seeds"
    )


def _privacy(study: Study) -> str:
    return f"epsilon {study.privacy.target_epsilon:g}"
