"""The public warm start: repeatable, and its codes look like the latents the generator will be fed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.generator.network import generator_from
from common.generator.transversal import TransversalGenerator
from common.generator.uptake import warm_spots
from common.phantom.draw import public_phantoms
from common.settings.study import Study
from common.telemetry.events import ignore
from server.pretrain import (
    _blurred,
    image_codes,
    normal_scores,
    phantom_lesson,
    principal_codes,
    reconstruction_loss,
    warm_start,
)
from tests.tiny_studies import tiny_study


def study(steps: int) -> Study:
    return tiny_study(training={"latent_size": 4}, warm_start={"steps": steps})


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    one, two, other = warm_start(study(8), 1, ignore), warm_start(study(8), 1, ignore), warm_start(study(8), 2, ignore)
    assert (one.generator.digest, one.critic.digest) == (two.generator.digest, two.critic.digest)
    assert one.generator.digest != other.generator.digest
    assert one.critic.digest != other.critic.digest


def test_without_steps_both_networks_are_just_initialised() -> None:
    start = warm_start(study(0), 1, ignore)
    assert start.generator.nbytes > 0
    assert start.critic.nbytes > 0


def test_public_phantoms_are_different_individuals() -> None:
    pairs = public_phantoms(study(0), seed=3, count=10).astype(np.float32)
    assert pairs.shape == (10, 2, 16, 16, 16)
    assert len({pair.tobytes() for pair in pairs}) == 10


def test_a_perfect_reconstruction_costs_nothing_and_a_mirrored_one_much() -> None:
    pairs = torch.zeros(2, 2, 4, 4, 4)
    pairs[:, 1, :2] = 1.0
    assert reconstruction_loss(pairs, pairs).item() < 1e-3
    assert reconstruction_loss(pairs.flip(2), pairs).item() > 1.0


def test_codes_are_like_standard_normal_latents_and_name_the_phantom() -> None:
    """Against a singular value decomposition of the same rows."""
    pairs = np.random.default_rng(0).normal(size=(20, 2, 8, 8, 8)).astype(np.float16)
    codes = principal_codes(pairs, size=6)
    assert np.allclose(codes.mean(axis=0), 0, atol=1e-4)
    assert np.allclose(codes.T @ codes / 20, np.eye(6), atol=1e-3)
    blocks = pairs.astype(np.float32).reshape(20, 2, 4, 2, 4, 2, 4, 2).mean(axis=(3, 5, 7))
    blocks[:, 1] *= 2
    rows = blocks.reshape(20, -1) - blocks.reshape(20, -1).mean(axis=0)
    left = np.linalg.svd(rows, full_matrices=False)[0][:, :6]
    assert np.allclose(np.abs(codes), np.abs(left) * np.sqrt(20), atol=1e-3)


def test_more_codes_than_phantoms_leave_the_rest_to_noise() -> None:
    pairs = np.random.default_rng(0).normal(size=(4, 2, 8, 8, 8)).astype(np.float16)
    codes = principal_codes(pairs, size=10)
    assert np.isfinite(codes).all()
    assert not codes[:, 4:].any()


# --- the family that paints on masks ------------------------------------------------------------------


def painted(steps: int) -> Study:
    return tiny_study(
        family="trgan",
        grid={"spacing_mm": (8.0, 8.0, 8.0)},
        intensity={"kind": "window", "low": 0.0, "high": 15.0},
        training={"latent_size": 32, "generator_width": 16},
        warm_start={"phantom": "lesions", "steps": steps, "volumes": 32},
    )


def reconstruction_of(study: Study) -> float:
    """Loss of the study's warm start on its own phantoms, from their codes and masks."""
    generator = generator_from(study, warm_start(study, 1, ignore).generator)
    assert isinstance(generator, TransversalGenerator)
    lesson = phantom_lesson(public_phantoms(study, 1, study.warm_start.volumes), study, 1)
    pairs = torch.from_numpy(lesson.pairs.astype(np.float32))
    with torch.no_grad():
        images = generator.painter(torch.from_numpy(lesson.codes), pairs[:, 1:])
    return reconstruction_loss(torch.cat([images, pairs[:, 1:]], dim=1), pairs).item()


def test_twenty_steps_of_painting_on_phantoms_masks_lower_the_loss() -> None:
    assert reconstruction_of(painted(20)) < 0.9 * reconstruction_of(painted(0))


def test_image_codes_say_how_hot_a_lesion_is_and_nothing_of_where() -> None:
    """The first code orders lesions by their mean; at one place another heat changes no other code."""
    pairs = np.zeros((6, 2, 8, 8, 8), dtype=np.float16)
    pairs[:, 0] = np.linspace(-0.5, 0.5, 8)[:, None, None]
    for number, pair in enumerate(pairs):
        pair[1, 2:5, 2:5, number % 4 : number % 4 + 3] = 1
        pair[0][pair[1] > 0] = 0.1 * number
    codes = image_codes(pairs, 5)
    assert codes.shape == (6, 5)
    assert np.argsort(codes[:, 0]).tolist() == list(range(6))
    assert np.allclose(codes[0, 2:], codes[4, 2:], atol=1e-3)


def test_normal_scores_keep_the_order_and_give_equal_numbers_one_score() -> None:
    values = np.array([[1e6, 0.0], [3.0, 0.0], [-2.0, 1e-9], [5.0, 7.0]])
    scores = normal_scores(values)
    assert np.argsort(scores[:, 0]).tolist() == [2, 1, 3, 0]
    assert scores[0, 0] == pytest.approx(-scores[2, 0], abs=1e-6)  # however heavy the tail
    assert scores[0, 1] == scores[1, 1] == scores[2, 1] < scores[3, 1]


def test_warm_spots_are_painted_where_a_code_says_and_noise_does_not_move_them() -> None:
    plain = painted(0)
    study = plain.model_copy(update={"training": plain.training.model_copy(update={"latent_size": 128})})
    phantoms = public_phantoms(study, 1, 8)
    lesson = phantom_lesson(phantoms, study, 3)
    numbers = torch.from_numpy(lesson.codes[:, lesson.drawn])
    assert numbers.shape == (8, 10)
    spots = 2 * warm_spots(numbers, torch.from_numpy(phantoms[:, 1:].astype(np.float32))).numpy() - 1
    assert np.allclose(lesson.pairs[:, :1], np.maximum(phantoms[:, :1], spots), atol=2e-3)
    assert not np.array_equal(lesson.pairs[:, 0], phantoms[:, 0])
    assert np.array_equal(lesson.pairs[:, 1], phantoms[:, 1])
    blurred = _blurred(lesson, torch.arange(8), torch.Generator().manual_seed(0)).numpy()
    assert np.array_equal(blurred[:, lesson.drawn], lesson.codes[:, lesson.drawn])
    assert (blurred[:, : lesson.drawn.start] != lesson.codes[:, : lesson.drawn.start]).all()
