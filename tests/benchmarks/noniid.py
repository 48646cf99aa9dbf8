"""Hospitals whose patients differ: which way of making one generator of several sites holds up, and where.

Three sites of phantom patients, without privacy noise, small enough for a few minutes. Five splits: `iid`;
`scanners`, each site's grey values and sharpness its own; `sizes`, the labelled structure small at one site and large
at another; `tiny site`, one site with few patients and another scanner; `missing label`, one site that never labels
the last structure. Every method starts from the same public start, runs the same rounds by the campaign's own loop, and
is tested on held-out patients of all sites, an equal number each and completely labelled:

- `local-only`: each site alone; the mean over sites of what its generator is worth on everybody's patients;
- `consilium, fedavg`: the mean of the generators after every round;
- `consilium, mixture`: averaged first, the last half of the rounds at each site alone; volumes of all their generators;
- `consilium, distilled`: the one student of that mixture, which is what an ensemble study releases;
- `pooled`: one site with everybody's patients, which no hospital may build; as many patients in a step as one site;
- `public start`: no hospital at all.

`dice`: of a segmenter trained on synthetic volumes, mean over labels, held-out patients and seeds. `dice_worst_site`:
the same for the site where it is lowest. `kid`: squared kernel distance to the held-out patients, 0 for equal
distributions. low, high: smallest and largest seed; a seed draws patients, public start, training and segmenter.
Settings were chosen by running time alone, before any score was seen, and serve every method. Differences within
low..high say nothing.

Mind the last row. Patients are phantoms of the law that the public start was trained on, and what a few minutes allow
moves a generator away from it: compare the methods with each other, and none of them with real patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.training.loop import train_round
from client.training.state import GameState
from common.evidence.chain import EvidenceChain
from common.generator.network import generator_from
from common.generator.sampling import LatentToPairs, sample_pairs
from common.generator.weights import Weights
from common.measure.fidelity.distances import squared_mmd
from common.measure.fidelity.encoder import Encoder, train_encoder
from common.measure.segmentation import dice_per_patient, train_segmenter
from common.phantom.draw import acquisition_grid, draw, patient_rng, public_phantoms
from common.phantom.scanner import Scanner, site_scanner
from common.privacy.calibration import plan_of
from common.privacy.mechanism import Plan
from common.protocol.messages import LedgerHead, Order, Reply, TrainOrder, TrainReply
from common.settings.load import study_digest
from common.settings.study import Study
from common.telemetry.events import ignore
from common.volume.prepare import prepare
from server.checkpoint import Checkpoint, CheckpointStore
from server.distillation import distil
from server.mixture import Mixture
from server.pretrain import WarmStart, warm_start
from server.round import TrainingCampaign, hold_rounds
from server.seeds import derive
from server.sites import NoReply
from tests.benchmarks.hospitals import each, say, utc_now
from tests.benchmarks.options import Options
from tests.benchmarks.report import OURS, Row

SITES = ("a", "b", "c")
SEEDS = 2
PATIENTS, HELD_OUT, TINY = 40, 16, 6  # a site's
VOLUMES = 128
SPLITS = ("iid", "scanners", "sizes", "tiny site", "missing label")
METHODS = ("local-only", f"{OURS}, fedavg", f"{OURS}, mixture", f"{OURS}, distilled", "pooled", "public start")
LOCAL, FEDAVG, MIXTURE, DISTILLED, POOLED, START = METHODS

# Of `scanners` and the tiny site: exponent of the grey-scale curve, sharpness, and gain, which only a PET shows.
SCANNERS = ((0.7, 0.3, 0.85), (1.0, 0.45, 1.0), (1.4, 0.7, 1.2))

Pairs = NDArray[np.float16]

_HIPPOCAMPUS: dict[str, Any] = {
    "study": "noniid-hippocampus",
    "purpose": "how a federation copes with sites that differ, on phantoms",
    "family": "wgan",
    "modality": "T1w",
    "labels": {1: "anterior", 2: "posterior"},
    "grid": {"shape": (16, 16, 16), "spacing_mm": (3.0, 3.0, 3.0)},
    "intensity": {"kind": "robust", "low": 1.0, "high": 99.0},
    "privacy": {
        "target_epsilon": None,
        "delta": 1e-3,
        "epsilon_cap": 20.0,
        "sampling_probability": 0.3,
        "reference_patients": PATIENTS,
    },
    "training": {
        "rounds": 4,
        "critic_steps_per_round": 16,
        "critic_steps_per_generator_step": 2,
        "critic_width": 4,
        "loss": "hinge",
        "critic_learning_rate": 8e-3,
        "generator_learning_rate": 2e-4,
        "latent_size": 16,
        "generator_width": 32,
        "fake_batch": 12,
    },
    "warm_start": {"phantom": "hippocampus", "volumes": 128, "steps": 150, "batch": 12},
    "audit": {"volumes": 64, "inversion_steps": 0, "canaries": 0},
    "federation": {
        "quorum": 1,
        "strategy": "ensemble",
        "fine_tune_rounds": 2,
        "distil_steps": 150,
        "distil_volumes": 256,
    },
    "utility": {"training_steps": 100, "volumes": VOLUMES},
}
_LESIONS = {
    **_HIPPOCAMPUS,
    "study": "noniid-lesions",
    "modality": "pet",
    "labels": {1: "lesion"},
    "grid": {"shape": (16, 16, 16), "spacing_mm": (11.0, 11.0, 11.0)},
    "intensity": {"kind": "window", "low": 0.0, "high": 15.0},
    "warm_start": {**_HIPPOCAMPUS["warm_start"], "phantom": "lesions"},
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """All methods on one split of one kind of phantoms, from one seed."""

    study: Study
    split: str
    seed: int

    @property
    def case(self) -> str:
        """How the rows name it."""
        training = self.study.training
        shape = "x".join(map(str, self.study.grid.shape))
        return (
            f"{self.study.warm_start.phantom.value} phantoms, {shape}, {len(SITES)} sites, "
            f"{training.rounds} rounds x {training.critic_steps_per_round} steps, no DP: {self.split}"
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """dice: by site, of the segmenter on that site's held-out patients. kid: to those of all sites."""

    dice: NDArray[np.float64]
    kid: float


def run(options: Options) -> list[Row]:
    """Measure every split; the methods of one split stand together."""
    seeds = 1 if options.quick else SEEDS
    jobs = [
        job
        for seed in range(seeds)
        for settings in (_HIPPOCAMPUS, _LESIONS)
        for split in SPLITS
        if options.wants((job := Job(study=_study(settings, quick=options.quick), split=split, seed=seed)).case)
        and (split != "missing label" or len(job.study.labels) > 1)
    ]
    scores: dict[tuple[str, int], Mapping[str, Score]] = {}
    for job, found in zip(jobs, each(jobs, measure, in_one_process=options.quick), strict=True):
        scores[job.case, job.seed] = found
        say(f"  {job.case}, seed {job.seed}: " + ", ".join(f"{m} {s.dice.mean():.3f}" for m, s in found.items()))
    return [
        row
        for case in dict.fromkeys(job.case for job in jobs)
        for row in _rows(case, [scores[case, s] for s in range(seeds)])
    ]


def _study(settings: Mapping[str, Any], *, quick: bool) -> Study:
    study = Study.model_validate(settings)
    if not quick:
        return study
    federation = study.federation.model_copy(update={"fine_tune_rounds": 1, "distil_steps": 4, "distil_volumes": 16})
    training = study.training.model_copy(update={"rounds": 2, "critic_steps_per_round": 2, "generator_width": 8})
    return study.model_copy(
        update={
            "federation": federation,
            "training": training,
            "warm_start": study.warm_start.model_copy(update={"volumes": 16, "steps": 4, "batch": 4}),
            "utility": study.utility.model_copy(update={"training_steps": 2, "volumes": 8}),
        }
    )


# --- one job -------------------------------------------------------------------------------------------


def measure(job: Job) -> dict[str, Score]:
    """Every method's score."""
    study, seed = job.study, job.seed
    members, heldout = patients_of(job)
    public = _public_start(study.model_dump_json(), seed)
    whole, fine = study.training.rounds, study.federation.fine_tune_rounds
    sites = TrainingSites(study, members, public, seed=seed)
    everybody = TrainingSites(study, {"pool": np.concatenate(list(members.values()))}, public, seed=seed)

    alone = _train(sites, public, fine_tune_rounds=whole)
    average = _train(sites, public, fine_tune_rounds=0).weights
    ensemble = _train(sites, public, fine_tune_rounds=fine)
    pooled = _train(everybody, public, fine_tune_rounds=0).weights
    mixture = Mixture(study, ensemble.own, dict.fromkeys(SITES, 1.0))
    student = distil(
        study,
        mixture,
        common=ensemble.weights,
        critic=public.critic,
        seed=derive(seed, "distillation"),
        observer=ignore,
    )

    def score(generator: LatentToPairs) -> Score:
        volumes = sample_pairs(generator, seed=derive(seed, "utility"), first=0, count=study.utility.volumes)
        return scored(job, volumes, heldout)

    single = {FEDAVG: average, DISTILLED: student, POOLED: pooled, START: public.generator}
    found = {method: score(generator_from(study, weights)) for method, weights in single.items()}
    found[MIXTURE] = score(mixture)
    apart = [score(generator_from(study, weights)) for weights in alone.own.values()]
    found[LOCAL] = Score(dice=np.mean([s.dice for s in apart], axis=0), kid=float(np.mean([s.kid for s in apart])))
    return {method: found[method] for method in METHODS}


def scored(job: Job, volumes: NDArray[np.floating], heldout: Mapping[str, Pairs]) -> Score:
    """What synthetic volumes are worth to each site, and how far they lie from everybody's patients."""
    labels = len(job.study.labels)
    segmenter = train_segmenter(volumes, labels=labels, steps=job.study.utility.training_steps, seed=job.seed)
    dice = [dice_per_patient(segmenter, pairs, labels=labels).mean() for pairs in heldout.values()]
    encoder = _encoder(job.study)
    kid = squared_mmd(encoder(np.concatenate(list(heldout.values()))), encoder(volumes))
    return Score(dice=np.array(dice), kid=kid)


@cache
def _public_start(text: str, seed: int) -> WarmStart:
    return warm_start(Study.model_validate_json(text), derive(seed, "warm start"), ignore)


@cache
def _encoder_of(text: str) -> Encoder:
    study = Study.model_validate_json(text)
    phantoms = public_phantoms(study, derive(0, "encoder"), study.warm_start.volumes).astype(np.float32)
    return train_encoder(phantoms, name="noniid", steps=study.utility.training_steps, seed=0)


def _encoder(study: Study) -> Encoder:
    return _encoder_of(study.model_dump_json())


# --- patients --------------------------------------------------------------------------------------------


def patients_of(job: Job) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """Members and held-out patients by site, (N, 1+K, D, H, W) each. Held-out patients are completely labelled."""
    scanners = [_scanner(job, site) for site in range(len(SITES))]
    each = PATIENTS + HELD_OUT
    drawn = [_phantoms(job, scanner, number, each) for number, scanner in enumerate(scanners)]
    if job.split == "sizes":
        everybody = np.concatenate(drawn)
        order = np.argsort(everybody[:, 1:].astype(np.float32).sum(axis=(1, 2, 3, 4)), kind="stable")
        rng = np.random.default_rng([job.seed, len(order)])  # who of a third is held out is not a matter of size
        drawn = [everybody[rng.permutation(third)] for third in np.split(order, len(SITES))]
    members = {site: pairs[HELD_OUT:] for site, pairs in zip(SITES, drawn, strict=True)}
    heldout = {site: pairs[:HELD_OUT] for site, pairs in zip(SITES, drawn, strict=True)}
    last = SITES[-1]
    if job.split == "tiny site":
        members[last] = members[last][:TINY]
    if job.split == "missing label":
        members[last] = members[last].copy()
        members[last][:, -1] = 0
    return members, heldout


def _scanner(job: Job, site: int) -> Scanner:
    neutral = replace(site_scanner(seed=job.seed, site=0), site=site + 1)
    shifted = job.split == "scanners" or (job.split == "tiny site" and site == len(SITES) - 1)
    if not shifted:
        return neutral
    contrast, blur_mm, scale = SCANNERS[site]
    return replace(neutral, contrast=contrast, blur_mm=blur_mm, gain=neutral.gain * scale ** (1 / 0.15))


def _phantoms(job: Job, scanner: Scanner, number: int, count: int) -> Pairs:
    """Individuals of a site, the same ones for every split of a seed."""
    study, kind = job.study, job.study.warm_start.phantom
    grid = acquisition_grid(kind, study.grid.as_grid())
    scans = (
        draw(kind, patient_rng(kind, derive(job.seed, "patients"), number, i), scanner, grid) for i in range(count)
    )
    prepared = [
        prepare(image, label, labels=study.labels, grid=study.grid.as_grid(), intensity=study.intensity)
        for image, label in scans
    ]
    return np.stack(prepared).astype(np.float16)


# --- sites that train --------------------------------------------------------------------------------------


@dataclass
class TrainingSites:
    """Sites in this process, without ledger and policy: `RoundSites` over the training that hospitals do.

    What a site did before with the very same orders is not done again, as at a hospital.
    """

    study: Study
    members: Mapping[str, Pairs]
    public: WarmStart
    seed: int
    _history: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _done: dict[tuple[str, tuple[str, ...]], tuple[Weights, GameState]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cohorts = {name: _cohort(pairs) for name, pairs in self.members.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self.members)

    @property
    def plan(self) -> Plan:
        """The study's; a site's average draw is the same number of patients at one site as at the pool."""
        return plan_of(self.study)

    def begin(self) -> None:
        """Every site as it was before its first round."""
        self._history = dict.fromkeys(self.names, ())

    def online(self, names: Iterable[str]) -> tuple[str, ...]:
        """Everybody, always."""
        return tuple(names)

    def ask(self, orders: Mapping[str, Order], deadline_s: float) -> dict[str, Reply | NoReply]:
        """Train."""
        return {name: self._answer(name, order) for name, order in orders.items() if isinstance(order, TrainOrder)}

    def _answer(self, name: str, order: TrainOrder) -> Reply:
        before = self._history[name]
        self._history[name] = now = (*before, order.weights_digest)
        if (name, now) not in self._done:
            self._done[name, now] = self._trained(name, order, self._done[name, before][1] if before else None)
        weights = self._done[name, now][0]
        return TrainReply(
            study_digest=order.study_digest,
            round=order.round,
            weights=weights,
            weights_digest=weights.digest,
            ledger_head=LedgerHead(rows=order.round, hash="0" * 64),
        )

    def _trained(self, name: str, order: TrainOrder, state: GameState | None) -> tuple[Weights, GameState]:
        kept = state.tensors() if state else GameState.start(self.study, self.public.critic).tensors()
        cohort = self._cohorts[name]
        mechanism = order.plan.mechanism
        if len(self.names) == 1:  # the pool draws as many patients a step as one site does
            mechanism = replace(mechanism, sampling_probability=mechanism.sampling_probability / len(SITES))
        return train_round(
            study=self.study,
            plan=replace(order.plan, mechanism=mechanism),
            weights=order.weights,
            state=GameState.restore(self.study, kept),
            cohort=cohort,
            stream=SecureStream.from_seed(self.seed, name, order.round),
            observer=ignore,
        )


def _cohort(pairs: Pairs) -> Cohort:
    names = [f"p{number:04d}" for number in range(len(pairs))]
    split = commit_split(names, [], SecureStream.from_seed(0, "split"))
    return Cohort.from_patients({name: pair[None] for name, pair in zip(names, pairs, strict=True)}, split)


def _train(sites: TrainingSites, public: WarmStart, *, fine_tune_rounds: int) -> Checkpoint:
    """The study's rounds by the campaign's own loop, the last ones for each site alone."""
    federation = sites.study.federation.model_copy(update={"fine_tune_rounds": fine_tune_rounds})
    study = sites.study.model_copy(update={"federation": federation})
    digest = study_digest(sites.study)
    sites.begin()
    with TemporaryDirectory(prefix="consilium-bench-") as temporary:
        folder = Path(temporary)
        return hold_rounds(
            TrainingCampaign(
                study=study,
                study_digest=digest,
                plan=sites.plan,
                participants=sites.names,
                site_weights=dict.fromkeys(sites.names, 1.0),
                sites=sites,
                store=CheckpointStore(folder, study_digest=digest),
                chain=EvidenceChain(folder / "evidence.jsonl"),
                observer=ignore,
                now=utc_now,
            ),
            public.generator,
        )


# --- rows --------------------------------------------------------------------------------------------------


def _rows(case: str, seeds: Sequence[Mapping[str, Score]]) -> list[Row]:
    """Every metric of every method, over seeds."""
    measured = {
        "dice": lambda score: float(score.dice.mean()),
        "dice_worst_site": lambda score: float(score.dice.min()),
        "kid": lambda score: score.kid,
    }
    return [
        Row(
            case=case,
            method=method,
            metric=metric,
            value=float(np.mean(values)),
            low=min(values),
            high=max(values),
            unit="squared distance" if metric == "kid" else "dice",
            n=len(values),
        )
        for metric, of in measured.items()
        for method in METHODS
        for values in [[of(scores[method]) for scores in seeds]]
    ]
