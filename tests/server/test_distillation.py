"""The mixture of the sites' generators, and the student that learns it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from common.adversary.critic import build_critic
from common.errors import IntegrityError
from common.evidence.chain import EvidenceChain
from common.generator.lesions import lesion_occupancy
from common.generator.network import build_generator, generator_from, load_weights, weights_of
from common.generator.sampling import latents, sample_pairs
from common.generator.transversal import code_size
from common.generator.weights import Weights
from common.measure.fidelity.distances import squared_mmd
from common.settings.study import Study
from common.telemetry.events import Observer, Progress, ignore
from server.aggregation import weighted_mean
from server.distillation import distil, distillation
from server.mixture import Mixture
from server.pretrain import WarmStart
from tests.server.scripted_hospitals import NOW
from tests.tiny_studies import tiny_study

ENSEMBLE = {"strategy": "ensemble", "fine_tune_rounds": 1, "distil_steps": 120, "distil_volumes": 64}
STUDY = tiny_study(federation=ENSEMBLE, training={"generator_width": 16})
EQUAL = {"a": 1.0, "b": 1.0}
SEED = 7


def site(study: Study, grey: float) -> Weights:
    """The generator of one initialisation, its images `grey` darker or brighter before they are squashed."""
    generator = build_generator(study, seed=3)
    with torch.no_grad():
        generator.paint.bias.add_(grey)
    return weights_of(generator)


def features(pairs: np.ndarray) -> np.ndarray:
    """(N, 1+K, 16, 16, 16) -> (N, 8 (1+K)): means of eight cells of image and labels."""
    n, channels = pairs.shape[:2]
    return pairs.reshape(n, channels, 2, 8, 2, 8, 2, 8).mean(axis=(3, 5, 7)).reshape(n, -1).astype(np.float64) * 10


# --- mixture -----------------------------------------------------------------------------------------


def test_each_volume_is_one_sites_own_and_sites_come_in_their_public_shares():
    mixture = Mixture(STUDY, {"a": site(STUDY, -2), "b": site(STUDY, 2)}, {"a": 3.0, "b": 1.0, "elsewhere": 50.0})
    drawn = latents(SEED, 0, 400, mixture.latent_size)
    with torch.inference_mode():
        grey = mixture(drawn)[:, 0].mean(dim=(1, 2, 3))
    assert [("b" if dark > 0 else "a") for dark in grey.tolist()] == list(mixture.site_of(drawn))
    assert 0.7 < mixture.site_of(drawn).count("a") / 400 < 0.8


def test_a_sites_volumes_are_distributed_as_its_own_generator_draws_them():
    """The coin is one number of the latent; spread again it must be standard normal within each site."""
    mixture = Mixture(STUDY, dict.fromkeys("abc", site(STUDY, 0)), dict.fromkeys("abc", 1.0))
    drawn = latents(SEED, 0, 6000, mixture.latent_size)
    chosen, spread = mixture._toss(drawn)
    for number in range(3):
        assert kstest(spread[chosen == number].numpy(), "norm").pvalue > 0.01
    cut = drawn[chosen == 0, -1].numpy()
    assert kstest(cut, "norm").pvalue < 1e-6  # as it came it is not


def test_a_mixture_gives_each_generator_the_coin_spread_again():
    """As the coin came, each generator would draw only from its own piece of the normal law."""
    mixture = Mixture(STUDY, dict.fromkeys("ab", site(STUDY, 0)), EQUAL)
    alone, drawn = generator_from(STUDY, site(STUDY, 0)), latents(SEED, 0, 16, mixture.latent_size)
    own = drawn.clone()
    own[:, -1] = mixture._toss(drawn)[1]
    with torch.inference_mode():
        assert torch.allclose(mixture(drawn), alone(own), atol=1e-5)
        assert not torch.allclose(mixture(drawn), alone(drawn), atol=1e-2)


def test_a_mixture_of_one_site_is_that_sites_generator():
    mixture = Mixture(STUDY, {"a": site(STUDY, 1)}, EQUAL)
    alone = sample_pairs(generator_from(STUDY, site(STUDY, 1)), seed=SEED, first=0, count=8)
    assert np.allclose(sample_pairs(mixture, seed=SEED, first=0, count=8), alone, atol=1e-5)


def test_the_coin_of_trgan_leaves_the_lesion_alone():
    study = tiny_study(
        family="trgan", labels={1: "tumour"}, training={"latent_size": 32}, warm_start={"phantom": "lesions"}
    )
    generators = {name: weights_of(build_generator(study, seed)) for seed, name in enumerate("ab")}
    drawn = latents(SEED, 0, 8, 32)
    with torch.inference_mode():
        masks = Mixture(study, generators, EQUAL)(drawn)[:, 1:]
    assert torch.equal(masks, lesion_occupancy(drawn[:, code_size(32) :], study.grid.as_grid()))


def test_a_mixture_of_nobody_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Mixture(STUDY, {}, {})


# --- student -----------------------------------------------------------------------------------------


def test_the_student_is_nearer_to_the_mixture_than_the_plain_average():
    """Two sites of opposite contrast, whose mean is a grey that neither has."""
    generators = {"a": site(STUDY, -1.5), "b": site(STUDY, 1.5)}
    average = weighted_mean(generators, EQUAL)
    mixture = Mixture(STUDY, generators, EQUAL)
    critic = weights_of(build_critic(STUDY))
    student = distil(STUDY, mixture, common=average, critic=critic, seed=SEED, observer=ignore)

    def drawn(weights: Weights) -> np.ndarray:
        return features(sample_pairs(generator_from(STUDY, weights), seed=99, first=0, count=128))

    wanted = features(sample_pairs(mixture, seed=98, first=0, count=128))
    of_average, of_student = squared_mmd(wanted, drawn(average)), squared_mmd(wanted, drawn(student))
    assert of_student < 0.25 * of_average
    greys = sample_pairs(generator_from(STUDY, student), seed=99, first=0, count=128)[:, 0].mean(axis=(1, 2, 3))
    assert (greys < -0.4).mean() > 0.3  # both sites are there, and little between them
    assert (greys > 0.4).mean() > 0.3


def test_a_student_of_equal_generators_stays_what_they_are():
    same = site(STUDY, 0.5)
    mixture = Mixture(STUDY, {"a": same, "b": same}, EQUAL)
    student = distil(STUDY, mixture, common=same, critic=weights_of(build_critic(STUDY)), seed=SEED, observer=ignore)
    before, after = (
        sample_pairs(generator_from(STUDY, weights), seed=99, first=0, count=64) for weights in (same, student)
    )
    assert np.abs(before - after).mean() < 0.1 * np.abs(before).mean()


# --- stage -------------------------------------------------------------------------------------------


SHORT = tiny_study(federation={**ENSEMBLE, "distil_steps": 4, "distil_volumes": 16})
PUBLIC = WarmStart(generator=site(SHORT, 0), critic=weights_of(build_critic(SHORT)))


def distilled(folder: Path, *, b: float = 1.0, observer: Observer = ignore) -> Weights:
    folder.mkdir(exist_ok=True)
    return distillation(
        SHORT,
        {"a": site(SHORT, -1), "b": site(SHORT, b)},
        folder / "distillation",
        common=site(SHORT, 0),
        public=PUBLIC,
        site_weights=EQUAL,
        seed=SEED,
        chain=EvidenceChain(folder / "evidence.jsonl"),
        observer=observer,
        now=lambda: NOW,
    )


def test_a_distillation_that_was_stopped_ends_in_the_same_student_and_one_record(tmp_path: Path):
    def ctrl_c(event: object) -> None:
        if isinstance(event, Progress) and event.done == 3:
            raise KeyboardInterrupt

    whole = distilled(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "broken", observer=ctrl_c)
    assert distilled(tmp_path / "broken").digest == whole.digest
    events: list[object] = []
    assert distilled(tmp_path / "broken", observer=events.append).digest == whole.digest
    assert events == []  # read back
    (record,) = EvidenceChain(tmp_path / "broken" / "evidence.jsonl").verify()
    assert record.body["generator_digest"] == whole.digest
    assert record.body["own_digests"] == {"a": site(SHORT, -1).digest, "b": site(SHORT, 1).digest}


def test_a_stored_student_of_other_generators_is_not_taken_for_this_one(tmp_path: Path):
    before = distilled(tmp_path, b=1.0)
    assert distilled(tmp_path, b=-0.5).digest != before.digest


def test_a_damaged_student_is_one_clear_error(tmp_path: Path):
    distilled(tmp_path)
    (stored,) = (tmp_path / "distillation").glob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="is damaged"):
        distilled(tmp_path)


def test_progress_is_told_for_every_step(tmp_path: Path):
    events: list[Progress] = []
    distilled(tmp_path, observer=lambda event: events.append(event) if isinstance(event, Progress) else None)
    assert [(event.done, event.total) for event in events] == [(n, 4) for n in (1, 2, 3, 4)]


def test_a_student_has_no_more_parameters_than_the_study_names(tmp_path: Path):
    student = distilled(tmp_path)
    load_weights(build_generator(SHORT), student)
    assert set(student.arrays) == set(weights_of(build_generator(SHORT)).arrays)
