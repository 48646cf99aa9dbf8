"""The warm-up: noised sums of public features, asked of every participant, and a generator fitted to them.

(1) one `WarmUpOrder` for all: the plan, and how many numbers it asks for
(2) validate each answer; below the quorum nothing is used
(3) add up, divide by public constants, and shrink towards what the public start gives already
(4) unless noise explains most of the answer, fit the public start to it, while its labels stay near what they were
(5) store and record: what was answered, and what came of it

Nothing after (1) touches data: the sums are private already, and the fit may take as many steps as it likes. What is on
disk is not asked again; a site would answer from its store anyway.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from common.errors import IntegrityError, Unreachable
from common.evidence.atomic import write_atomic
from common.evidence.chain import EvidenceChain
from common.generator.network import (
    StudyGenerator,
    generator_from,
    read_weights,
    save_weights,
    weights_of,
)
from common.generator.weights import Weights
from common.measure.features import CLIP_NORM, FeatureMap, feature_map
from common.privacy.mechanism import Plan
from common.protocol.messages import RELEASE_GRID, RefusalReply, Reply, WarmUpOrder, WarmUpReply
from common.settings.load import study_digest
from common.settings.study import Study
from common.telemetry.events import Observer, Progress
from server.evidence_log import append_once
from server.sites import NoReply, Sites

TASK: Final = "warm-up"
WARM_UP_RECORD: Final = "warm-up"
LATENTS: Final = 256  # whose mean features say where the public start stands
BATCH: Final = 32  # volumes a step of the fit; in two halves, see `squared_distance`
LABEL_WEIGHT: Final = 60.0  # of the mean squared change of the occupancies
LEAST_SIGNAL: Final = 0.5  # of the answer's way from the public start; below it the start is kept
EVEN_SHARE: Final = 0.1  # of what is believed before looking: real scans also differ where phantoms do not
LARGEST_SUM: Final = 1e6


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmedUp:
    """The generator that training begins with. sums by site; missing: fixed phrase by site."""

    generator: Weights
    sums: Mapping[str, tuple[float, ...]]
    missing: Mapping[str, str]


def warm_up(
    study: Study,
    plan: Plan,
    sites: Sites,
    folder: Path,
    *,
    participants: tuple[str, ...],
    start: Weights,
    seed: int,
    chain: EvidenceChain,
    observer: Observer,
    now: Callable[[], datetime],
) -> WarmedUp:
    """Steps (1) to (5), or what is left of them. start: the public generator. seed: of the fit's latents.

    Raises Unreachable below the quorum, IntegrityError when something on disk is damaged.
    """
    if study.warm_up is None or plan.warm_up is None:
        raise ValueError("the study has no warm-up")
    sums, missing = _answers(study, plan, sites, folder / "answers.json", participants)  # (1) (2)
    fitted = folder / "generator.safetensors"
    if fitted.exists():
        generator = read_weights(fitted)
    else:
        features = feature_map(study)
        network = generator_from(study, start)
        stands = mean_features(features, network, seed)
        target = shrunk(  # (3)
            mean_of_sums(sums, study.privacy.reference_patients),
            towards=stands,
            spread=features.spread,
            noise=noise_of_mean(plan, study.privacy.reference_patients, sites=len(sums)),
        )
        generator = start  # (4)
        if not torch.equal(target, stands):
            generator = fit(study, features, start=start, target=target, seed=seed, observer=observer)
        save_weights(fitted, generator)
    append_once(  # (5)
        chain,
        WARM_UP_RECORD,
        {
            "start_digest": start.digest,
            "answers": {name: _digest(values) for name, values in sums.items()},
            "missing": dict(missing),
            "noise_multiplier": plan.warm_up.noise_multiplier,
            "generator_digest": generator.digest,
        },
        now,
    )
    return WarmedUp(generator=generator, sums=sums, missing=missing)


# --- the answers --------------------------------------------------------------------------------------


def _answers(
    study: Study, plan: Plan, sites: Sites, file: Path, participants: tuple[str, ...]
) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    if file.exists():
        return _read(file)
    if study.warm_up is None:
        raise ValueError("the study has no warm-up")
    order = WarmUpOrder(study_digest=study_digest(study), plan=plan, features=study.warm_up.features(len(study.labels)))
    answers = sites.ask(dict.fromkeys(participants, order), study.federation.deadline_s)
    sums: dict[str, tuple[float, ...]] = {}
    missing: dict[str, str] = {}
    for name, answer in answers.items():
        checked = check_answer(answer, order)
        if isinstance(checked, str):
            missing[name] = checked
        else:
            sums[name] = checked
    if len(sums) < study.federation.quorum:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise Unreachable(
            f"{len(sums)} of {len(participants)} sites answered the warm-up, the study needs "
            f"{study.federation.quorum}; nothing was fitted ({reasons}). Repeat the command when they are back: those "
            "that answered send the same numbers again at no further cost."
        )
    write_atomic(file, json.dumps({"sums": sums, "missing": missing}, sort_keys=True, allow_nan=False).encode())
    return sums, missing


def check_answer(answer: Reply | NoReply, order: WarmUpOrder) -> tuple[float, ...] | str:  # noqa: PLR0911  # one return a case
    """The sums in a reply to `order`, or the fixed phrase why they are not used."""
    match answer:
        case NoReply(reason=reason):
            return str(reason)
        case RefusalReply(code=code):
            return f"site refused ({code})"
        case WarmUpReply() if answer.study_digest != order.study_digest:
            return "reply is for another study"
        case WarmUpReply() if len(answer.sums) != order.features:
            return "reply has another number of sums"
        case WarmUpReply() if not all(abs(v) <= LARGEST_SUM and (v / RELEASE_GRID).is_integer() for v in answer.sums):
            return "a sum is not on the fixed grid"
        case WarmUpReply():
            return answer.sums
        case _:
            return "reply is of another kind"


def _read(file: Path) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    try:
        body = json.loads(file.read_bytes())
        return {name: tuple(map(float, values)) for name, values in body["sums"].items()}, dict(body["missing"])
    except (ValueError, KeyError, TypeError, AttributeError) as damage:
        raise IntegrityError(
            f"{file} is damaged; nothing was fitted. Delete it and repeat the command: the sites send the same numbers "
            "again at no further cost."
        ) from damage


def _digest(values: tuple[float, ...]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


# --- the target ---------------------------------------------------------------------------------------


def mean_of_sums(sums: Mapping[str, tuple[float, ...]], reference_patients: int) -> Tensor:
    """(d,) float64: the sums added up, divided by the public number of patients that the sites stand for.

    Never by how many there really were, which is private. Features are measured from the phantoms' mean, so a site with
    other than `reference_patients` members pulls a little more or less; it does not shift the target.
    """
    columns = zip(*sums.values(), strict=True)
    # fsum: the same bits whatever the order of the sites.
    return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64) / (
        len(sums) * reference_patients
    )


def noise_of_mean(plan: Plan, reference_patients: int, *, sites: int) -> float:
    """Standard deviation of the noise in each coordinate of `mean_of_sums`: every site added its own."""
    multiplier = plan.warm_up.noise_multiplier if plan.warm_up else 0.0
    return multiplier * CLIP_NORM / (math.sqrt(sites) * reference_patients)


def shrunk(mean: Tensor, *, towards: Tensor, spread: Tensor, noise: float) -> Tensor:
    """The mean, drawn towards a public point as far as noise alone may have carried it away.  [Efron and Morris 1973]

    Empirical Bayes: the way from the public point is Gaussian with a covariance in proportion to `spread`, a tenth of
    it evenly in all directions; the noise is noise^2 * I; the proportion is what the length of the way leaves for it.
    Features go together (neighbouring voxels are alike), so noise across what phantoms vary in is told from a
    shift along it. Where noise explains half of the way or more, the public point itself: a generator fitted to
    mostly noise is worse than one that was never fitted. Without noise, the mean itself.

    mean, towards: (d,) float64. spread: (d, d), covariance of the features over phantoms.
    """
    if noise == 0:
        return mean
    way = mean - towards
    everywhere = torch.eye(len(way), dtype=torch.float64)
    prior = (1 - EVEN_SHARE) * spread / spread.trace() + EVEN_SHARE * everywhere / len(way)
    length = float(way.square().sum())
    explained = length - len(way) * noise**2
    if explained <= LEAST_SIGNAL * length:
        return towards
    believed = explained * prior
    unsure = believed + noise**2 * everywhere
    shift: Tensor = believed @ torch.linalg.solve(unsure, way)
    return towards + shift


def mean_features(features: FeatureMap, network: StudyGenerator, seed: int) -> Tensor:
    """(d,) float64: mean features of volumes from a public seed, not clipped: see `fit`."""
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn((LATENTS, network.latent_size), generator=rng)
    with torch.no_grad():
        rows = [features(network(batch)).double() for batch in torch.split(latents, BATCH)]
    return torch.cat(rows).mean(dim=0)


# --- the fit ------------------------------------------------------------------------------------------


def fit(
    study: Study,
    features: FeatureMap,
    *,
    start: Weights,
    target: Tensor,
    seed: int,
    observer: Observer,
) -> Weights:
    """The public start, moved until its mean features are the target. target: (d,) float64.

    A hundred numbers say little about a network of half a million parameters, so each volume keeps its labels: the mean
    squared change of its occupancies, against the start fed with the same latent, is added to the distance. Without it
    labels crumble to where the grey values fit. Fresh latents in every step, from the seed.

    Volumes are not clipped as patients are. Clipping shortens the target a little; a clipped volume could only be
    turned, not moved, and the others would have to overshoot for it.
    """
    settings = study.warm_up
    if settings is None:
        raise ValueError("the study has no warm-up")
    network, before = generator_from(study, start), generator_from(study, start)
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    rng = torch.Generator().manual_seed(seed)
    wanted = target.float()
    for step in range(settings.steps):
        latents = torch.randn((BATCH, network.latent_size), generator=rng)
        pairs = network(latents)
        with torch.no_grad():
            labels = before(latents)[:, 1:]
        loss = squared_distance(features(pairs), wanted)
        loss = loss + LABEL_WEIGHT * (pairs[:, 1:] - labels).square().sum(dim=1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        observer(Progress(task=TASK, done=step + 1, total=settings.steps))
    return weights_of(network)


def squared_distance(rows: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the mean feature vector from the target, from (N, d) rows, without bias.

    The product of two halves' distances: the square of one batch's mean would also hold the variance of its rows
    over N, and would be lowered by making all volumes alike.
    """
    first, second = rows.chunk(2)
    return ((first.mean(dim=0) - target) * (second.mean(dim=0) - target)).sum()
