"""One generator for the release, out of the sites' own: a student of their mixture.

(1) the mixture of the sites' generators, with public weights
(2) volumes drawn from it, with a public seed
(3) the student, which begins as the last common generator, learns to give the same volume for the same latent, and
    then plays the sites' game against them, with the public critic
(4) store and record: what it was made of, and its digest

Nothing here touches data. The sites' generators are differentially private already, and what is computed from them is
post-processing, which costs no epsilon [Dwork & Roth 2014, Prop. 2.1]. A patient pays what their own site's training
cost, whatever the others' did: sites hold different people, so budgets compose in parallel, see `federation_epsilon`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
import torch

from common.adversary.critic import build_critic
from common.evidence.canonical import Json, canonical_json, sha256_hex
from common.evidence.chain import EvidenceChain
from common.generator.network import build_generator, load_weights, read_weights, save_weights, weights_of
from common.generator.sampling import latents, sample_pairs
from common.generator.weights import Weights
from common.settings.study import Study
from common.telemetry.events import Observer, Progress
from server.evidence_log import append_once
from server.mixture import Mixture
from server.pretrain import GAME_SHARE, WarmStart, play, reconstruct

DISTILLATION_RECORD: Final = "distillation"
LEARNING_RATE: Final = 2e-3  # of step (3)'s first half; a beginner gets twice that, see `pretrain`


def distillation(
    study: Study,
    generators: Mapping[str, Weights],
    folder: Path,
    *,
    common: Weights,
    public: WarmStart,
    site_weights: Mapping[str, float],
    seed: int,
    chain: EvidenceChain,
    observer: Observer,
    now: Callable[[], datetime],
) -> Weights:
    """Steps (1) to (4), or the student from disk when it was made of the same generators.

    generators: each site's own. common: the last one of all. Raises IntegrityError when the stored one is damaged.
    """
    made_of: dict[str, Json] = {
        "own_digests": {site: generators[site].digest for site in sorted(generators)},
        "site_weights": {site: site_weights[site] for site in sorted(generators)},
        "common_digest": common.digest,
        "critic_digest": public.critic.digest,
        "seed": seed,
    }
    # Rounds that are held again, as after a damaged checkpoint, give other generators: an older student is not theirs.
    stored = folder / f"student-{sha256_hex(canonical_json(made_of))[:16]}.safetensors"
    if stored.exists():
        student = read_weights(stored)
    else:
        mixture = Mixture(study, generators, site_weights)
        student = distil(study, mixture, common=common, critic=public.critic, seed=seed, observer=observer)
        folder.mkdir(exist_ok=True)
        save_weights(stored, student)
    append_once(chain, DISTILLATION_RECORD, {**made_of, "generator_digest": student.digest}, now)
    return student


def distil(
    study: Study, mixture: Mixture, *, common: Weights, critic: Weights, seed: int, observer: Observer
) -> Weights:
    """Steps (2) and (3). The same arguments give the same student on the same machine."""
    settings = study.federation
    volumes = sample_pairs(mixture, seed=seed, first=0, count=settings.distil_volumes).astype(np.float16)
    codes = latents(seed, 0, settings.distil_volumes, mixture.latent_size)
    student, judge = build_generator(study), build_critic(study)
    load_weights(student, common)
    load_weights(judge, critic)
    rng = torch.Generator().manual_seed(seed)
    game_steps = round(GAME_SHARE * settings.distil_steps)
    steps = settings.distil_steps - game_steps

    def done(step: int) -> None:
        observer(Progress(task=DISTILLATION_RECORD, done=step, total=settings.distil_steps))

    reconstruct(
        study,
        generator=student,
        output=lambda chosen, _: student(codes[chosen]),
        pairs=volumes,
        steps=steps,
        learning_rate=LEARNING_RATE,
        rng=rng,
        done=done,
    )
    if game_steps:
        play(
            study,
            generator=student,
            critic=judge,
            pairs=volumes,
            steps=game_steps,
            rng=rng,
            done=lambda step: done(steps + step),
        )
    return weights_of(student)
