"""Simulated hospitals for benchmarks: enrolled and ready to train, by the functions of a real campaign.

A run folder of `server.simulate` as it is after enrolment; nothing of the audit or the release.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import client
import common
import server
from client.cohort import Cohort
from client.store import SiteStore
from common.errors import Unreachable
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import ENROLMENT_RECORD
from common.evidence.signing import public_key_hex
from common.generator.network import read_weights, save_weights
from common.generator.weights import Weights
from common.privacy.calibration import plan_of
from common.settings.load import study_digest
from common.settings.site import load_site
from common.settings.study import Study
from common.telemetry.events import Event, Observer, Progress, ignore
from common.telemetry.logs import events_file, fan_out
from common.telemetry.metrics import metrics_file
from server.campaign import EQUAL_WEIGHT
from server.checkpoint import CheckpointStore
from server.components import Component, load
from server.enrolment import enrol, enrolment_from
from server.evidence_log import last_record
from server.pretrain import WarmStart, warm_start
from server.round import TrainingCampaign
from server.run_folder import Engine, RunFacts, RunFolder
from server.seeds import derive
from server.simulate import LocalGrid
from server.simulated_sites import Cohorts, plan_sites, write_sites
from server.sites import GridSites
from server.warm_up import WARM_UP_RECORD, warm_up

PROGRESS_EVERY_S = 10.0

Job = TypeVar("Job")
Found = TypeVar("Found")


def utc_now() -> datetime:
    """The time, aware."""
    return datetime.now(UTC)


def say(text: str) -> None:
    """One line for whoever waits; the tables go to standard output."""
    print(text, file=sys.stderr, flush=True)


def each(jobs: Sequence[Job], measure: Callable[[Job], Found], *, in_one_process: bool) -> Iterator[Found]:
    """Results in the order of the jobs; one process with one thread for each core unless `in_one_process`.

    Several small trainings at once are quicker than one on all cores.
    """
    if in_one_process:
        yield from map(measure, jobs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes when they start
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure, jobs)


def progress() -> Observer:
    """An observer that says now and then how far the longest task is."""
    last = [time.monotonic()]

    def tell(event: Event) -> None:
        if isinstance(event, Progress) and time.monotonic() - last[0] > PROGRESS_EVERY_S:
            last[0] = time.monotonic()
            say(f"  {event.task}: {event.done} of {event.total}")

    return tell


def enrolled_run(
    study: Study, source: Cohorts, folder: Path, *, seed: int, public: WarmStart, observer: Observer = ignore
) -> RunFolder:
    """A run folder whose hospitals have all enrolled; nobody has trained yet.

    Raises UsageError as `consilium simulate` does, Unreachable when a hospital refuses.
    """
    settings = plan_sites(study, source, seed)
    facts = RunFacts(
        engine=Engine.LOCAL,
        sites=tuple(site.site for site in settings),
        seed=seed,
        simulated=True,
        study_digest=study_digest(study),
    )
    run = RunFolder.create_or_resume(folder, study, facts)
    key = public_key_hex(run.signing_key().public_key())
    write_sites(run, settings, study, plan_of(study), coordinator_key=key, now=utc_now())
    enrolment = enrol(
        study,
        _grid_sites(run, observer),
        public_generator=public.generator,
        public_critic=public.critic,
        coordinator_key=key,
        chain=EvidenceChain(run.evidence),
        now=utc_now,
    )
    if enrolment.refused:
        raise Unreachable(f"a benchmark needs every hospital, not enrolled: {dict(enrolment.refused)}")
    return run


def training_of(run: RunFolder, *, observer: Observer = ignore) -> TrainingCampaign:
    """The training of an enrolled run, watched by what watches a real one."""
    study = run.study
    digest = study_digest(study)
    chain = EvidenceChain(run.evidence)
    record = last_record(chain, ENROLMENT_RECORD)
    if record is None:
        raise ValueError(f"nobody enrolled in {run.path}")
    names = enrolment_from(record, digest).names
    return TrainingCampaign(
        study=study,
        study_digest=digest,
        plan=plan_of(study),
        participants=names,
        site_weights=dict.fromkeys(names, EQUAL_WEIGHT),
        sites=_grid_sites(run, observer),
        store=CheckpointStore(run.checkpoints, study_digest=digest),
        chain=chain,
        observer=fan_out(events_file(run.events, utc_now), metrics_file(run.metrics), observer),
        now=utc_now,
    )


def warmed_up(run: RunFolder, public: WarmStart, *, observer: Observer = ignore) -> Weights:
    """What training begins with: the public start, fitted to the hospitals' warm-up where the study has one."""
    campaign = training_of(run, observer=observer)
    if campaign.plan.warm_up is None:
        return public.generator
    return warm_up(
        campaign.study,
        campaign.plan,
        campaign.sites,
        run.warm_up,
        participants=campaign.participants,
        start=public.generator,
        seed=derive(run.facts.seed, WARM_UP_RECORD),
        chain=campaign.chain,
        observer=campaign.observer,
        now=utc_now,
    ).generator


def cohorts_of(run: RunFolder) -> dict[str, Cohort]:
    """What each hospital trains on and holds out, read from its own disk."""
    return {name: _cohort(run, name) for name in run.facts.sites}


def public_start(study: Study, *, seed: int, cache: Path | None = None, observer: Observer = ignore) -> WarmStart:
    """The campaign's warm start, from `cache` when the same one was made before."""
    if cache is None:
        return warm_start(study, derive(seed, "warm start"), observer)
    name = _warm_start_key(study, seed)
    generator, critic = cache / f"{name}-generator.safetensors", cache / f"{name}-critic.safetensors"
    if generator.exists() and critic.exists():
        return WarmStart(generator=read_weights(generator), critic=read_weights(critic))
    public = warm_start(study, derive(seed, "warm start"), observer)
    cache.mkdir(parents=True, exist_ok=True)
    save_weights(generator, public.generator)
    save_weights(critic, public.critic)
    return public


# What of a study's training only matters once real patients come in.
_NOT_IN_WARM_START = {"rounds", "critic_steps_per_round", "views_per_patient"}
_WARM_START_PACKAGES = ("adversary", "generator", "phantom", "volume")


def _warm_start_key(study: Study, seed: int) -> str:
    """Digest of everything a warm start depends on, its code included: a stale one would be measured for the new."""
    settings = {
        **study.model_dump(mode="json", include={"grid", "intensity", "labels", "warm_start"}),
        "training": study.training.model_dump(mode="json", exclude=_NOT_IN_WARM_START),
        "seed": seed,
    }
    h = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    shared = Path(common.__path__[0])
    return _with_sources(h, [Path(server.__path__[0]) / "pretrain.py", *_modules(shared, _WARM_START_PACKAGES)])


@cache
def source_digest() -> str:
    """Digest of all code that a trained and measured generator depends on, but for the public start's own key."""
    sites, coordinator = Path(client.__path__[0]), Path(server.__path__[0])
    shared = _modules(Path(common.__path__[0]), (*_WARM_START_PACKAGES, "measure", "privacy"))
    trained = [*sorted((sites / "training").rglob("*.py")), sites / "cohort.py", sites / "randomness.py"]
    combined = [coordinator / f"{name}.py" for name in ("round", "aggregation", "warm_up")]
    return _with_sources(hashlib.sha256(), [*shared, *trained, *combined])


def _modules(root: Path, packages: Sequence[str]) -> list[Path]:
    return [path for package in packages for path in sorted((root / package).glob("*.py"))]


def _with_sources(h: hashlib._Hash, sources: Sequence[Path]) -> str:
    for source in sources:
        h.update(source.read_bytes())
    return h.hexdigest()[:24]


def _grid_sites(run: RunFolder, observer: Observer) -> GridSites:
    names = run.facts.sites
    config = {"run": str(run.path.resolve()), "sites": str(run.sites.resolve())}
    return GridSites(LocalGrid(load(Component.CLIENT), names, config, observer=observer), names)


def _cohort(run: RunFolder, name: str) -> Cohort:
    settings = load_site(run.sites / name / "site.yaml")
    store = SiteStore(settings.state).study(run.facts.study_digest)
    if store is None:
        raise ValueError(f"{name} is not enrolled in the run in {run.path}")
    return store.cohort()
