"""What the in-process federation costs beyond the sites' training.

A round through the Grid is orders, codec, ClientApp, policy, ledger, the site's store, training, manifest,
aggregation, checkpoint and evidence. Beside it stands the bare training: `train_round` called with the same weights,
plan, cohort and stream, its networks kept in memory. Both take turns in one process, and both must end in the very
same weights. Caches of earlier repeats are emptied, so that each repeat pays what a fresh run pays.

value: median over repeats; low, high: smallest and largest repeat. Wall time; `overhead_ratio_cpu` is the same
in processor time, which other programs on the machine and the disk do not disturb.
"""

from __future__ import annotations

import cProfile
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from client.cohort import Cohort
from client.randomness import SecureStream
from client.training.canaries import canaries_of
from client.training.loop import train_round
from client.training.state import GameState
from common.generator.weights import Weights
from common.privacy import accounting, calibration
from common.protocol import codec
from common.protocol.messages import TrainOrder
from common.settings.site import OrderKind, load_site
from common.settings.study import Study
from common.telemetry.events import ignore
from server.checkpoint import Checkpoint
from server.pretrain import WarmStart
from server.round import TrainingCampaign, hold_round, training_epsilon
from server.run_folder import RunFolder
from server.simulated_sites import Cohorts
from tests.benchmarks.breakdown import shares
from tests.benchmarks.hospitals import cohorts_of, enrolled_run, public_start, say, training_of
from tests.benchmarks.options import Options
from tests.benchmarks.report import OURS, Row
from tests.benchmarks.studies import PRIVATE, QUICK_PATIENTS, shipped

TARGET = 1.10
SITES = 3
PATIENTS = 60
ROUNDS = 2
STEPS = 20  # a round of the shipped study
LEAST_REPEATS = 3
SECONDS = 60.0  # no further repeat is begun after that
SEED = 0
DIRECT = "train_round called directly"


@dataclass
class Clock:
    """Seconds of what ran inside `running`: by the wall and of this process's processor."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the block's time."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


@dataclass
class Repeat:
    """One federation, trained both ways."""

    federation: Clock = field(default_factory=Clock)
    direct: Clock = field(default_factory=Clock)


def run(options: Options) -> list[Row]:
    """Measure; rows on where the overhead goes are added when it is above the target."""
    study = benchmark_study(options)
    patients, least, seconds = (QUICK_PATIENTS, 1, 0.0) if options.quick else (PATIENTS, LEAST_REPEATS, SECONDS)
    public = public_start(study, seed=SEED)  # never from a cache: it takes torch's first steps, outside of all clocks
    with TemporaryDirectory(prefix="consilium-bench-") as temporary:
        folder = Path(temporary)
        source = Cohorts(folder=None, sites=SITES, phantoms=patients)
        enrolled = enrolled_run(study, source, folder / "enrolled", seed=SEED, public=public)
        done: list[Repeat] = []
        began = time.monotonic()
        while len(done) < least or time.monotonic() - began < seconds:
            turn = len(done)
            done.append(_repeat(_copy(enrolled, folder / f"repeat-{turn}"), public, turn=turn))
            say(f"simulation: repeat {turn + 1}: {done[-1].federation.wall / done[-1].direct.wall:.3f}")
        rows = _rows(_case(study, patients), done)
        if rows[0].value > TARGET:
            rows += _where_it_goes(_copy(enrolled, folder / "profiled"), public, case=rows[0].case)
    return rows


def benchmark_study(options: Options) -> Study:
    """The hippocampus study, shortened; the size of the networks and of the draws is the shipped one."""
    study = shipped(PRIVATE, folder=options.studies, quick=options.quick)
    if options.quick:
        return study
    training = study.training.model_copy(update={"rounds": ROUNDS, "critic_steps_per_round": STEPS})
    # What the generator looks like changes no time.
    public = study.warm_start.model_copy(update={"volumes": 16, "steps": 4})
    return study.model_copy(update={"training": training, "warm_start": public})


def _repeat(run: RunFolder, public: WarmStart, *, turn: int) -> Repeat:
    """All rounds, both ways in turn. Raises ValueError when the two did different work."""
    _forget()
    campaign = training_of(run)
    direct = _Direct(campaign, run, public)
    result = Repeat()
    last: Checkpoint | None = None
    for number in range(1, campaign.plan.rounds + 1):
        order = _order(campaign, number, last.weights if last else public.generator)
        trained: dict[str, str] = {}
        direct_first = (number + turn) % 2 == 0
        if direct_first:
            trained = direct.train(order, result.direct)
        with result.federation.running():
            held = hold_round(campaign, last, public.generator)
        if not direct_first:
            trained = direct.train(order, result.direct)
        if not isinstance(held, Checkpoint) or dict(held.record.replies) != trained:
            raise ValueError(f"round {number} through the Grid is not what direct training gives; nothing was measured")
        last = held
    return result


class _Direct:
    """The sites' training without anything around it."""

    def __init__(self, campaign: TrainingCampaign, run: RunFolder, public: WarmStart) -> None:
        self._campaign = campaign
        self._cohorts: Mapping[str, Cohort] = cohorts_of(run)
        self._seeds = {name: load_site(run.sites / name / "site.yaml").simulation_seed or 0 for name in self._cohorts}
        self._states = {name: GameState.start(campaign.study, public.critic) for name in self._cohorts}

    def train(self, order: TrainOrder, clock: Clock) -> dict[str, str]:
        """One round at every site; the digest of each site's generator. Only the training itself is timed."""
        digests: dict[str, str] = {}
        for name, cohort in self._cohorts.items():
            stream = SecureStream.from_seed(
                self._seeds[name],
                name,
                order.study_digest,
                order.round,
                OrderKind.TRAIN.value,
                codec.digest(order),
            )
            secret = SecureStream.from_seed(self._seeds[name], name, "holdout").fork("canaries", order.study_digest)
            weights: Weights
            with clock.running():
                weights, self._states[name] = train_round(
                    study=self._campaign.study,
                    plan=order.plan,
                    weights=order.weights,
                    state=self._states[name],
                    cohort=cohort,
                    stream=stream,
                    observer=ignore,
                    canaries=canaries_of(self._campaign.study, self._states[name].critic, secret),
                )
            digests[name] = weights.digest
        return digests


def _order(campaign: TrainingCampaign, number: int, weights: Weights) -> TrainOrder:
    """The order that `hold_round` sends: its digest keys the site's randomness."""
    return TrainOrder(
        study_digest=campaign.study_digest,
        round=number,
        weights=weights,
        weights_digest=weights.digest,
        plan=campaign.plan,
        deadline_s=campaign.study.federation.deadline_s,
    )


def _forget() -> None:
    """Empty the accountants' caches: a fresh run has none."""
    training_epsilon.cache_clear()
    accounting._subsampled_gaussian.cache_clear()
    calibration._least_noise.cache_clear()


def _copy(enrolled: RunFolder, path: Path) -> RunFolder:
    """The run as it was after enrolment; everything in it is found relative to its folder."""
    shutil.copytree(enrolled.path, path)
    return RunFolder.open(path)


def _case(study: Study, patients: int) -> str:
    shape = "x".join(map(str, study.grid.shape))
    training = study.training
    return (
        f"{shape}, {SITES} sites, {patients} phantom patients each, "
        f"{training.rounds} rounds x {training.critic_steps_per_round} steps"
    )


def _rows(case: str, repeats: list[Repeat]) -> list[Row]:
    """The ratios first, then the seconds of all rounds they come from."""
    measured = [
        (OURS, "overhead_ratio", "ratio", [r.federation.wall / r.direct.wall for r in repeats]),
        (OURS, "overhead_ratio_cpu", "ratio", [r.federation.cpu / r.direct.cpu for r in repeats]),
        (OURS, "training_seconds", "s", [r.federation.wall for r in repeats]),
        (DIRECT, "training_seconds", "s", [r.direct.wall for r in repeats]),
        (OURS, "training_cpu_seconds", "s", [r.federation.cpu for r in repeats]),
        (DIRECT, "training_cpu_seconds", "s", [r.direct.cpu for r in repeats]),
    ]
    return [
        Row(
            case=case,
            method=method,
            metric=metric,
            value=statistics.median(values),
            low=min(values),
            high=max(values),
            unit=unit,
            n=len(values),
        )
        for method, metric, unit, values in measured
    ]


def _where_it_goes(run: RunFolder, public: WarmStart, *, case: str) -> list[Row]:
    """Shares of the overhead, from one more repeat under the profiler, largest first."""
    _forget()
    campaign = training_of(run)
    profile = cProfile.Profile()
    last: Checkpoint | None = None
    for _ in range(campaign.plan.rounds):
        held = profile.runcall(hold_round, campaign, last, public.generator)
        last = held if isinstance(held, Checkpoint) else last
    return [
        Row(
            case=f"{case}: {part}",
            method=OURS,
            metric="share_of_overhead",
            value=share,
            low=None,
            high=None,
            unit="fraction",
            n=1,
        )
        for part, share in shares(profile)
    ]
