"""The `trgan` generator: latents in, pairs out, and the mask of a pair is the one that its image was painted on."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from common.generator.lesions import FORM_SIZE, lesion_occupancy
from common.generator.network import build_generator, load_weights, weights_of
from common.generator.sampling import latents, sample_pairs
from common.generator.transversal import TransversalGenerator
from common.generator.weights import Weights
from common.settings.study import Study
from tests.tiny_studies import tiny_study

MODES = pytest.mark.parametrize("mode", ["platform", "paper"])


def study(shape: tuple[int, int, int] = (16, 16, 16), mode: str = "platform") -> Study:
    return tiny_study(
        family="trgan",
        grid={"shape": shape, "spacing_mm": (5.0, 5.0, 5.0)},
        training={"latent_size": 32, "mode": mode},
        warm_start={"phantom": "lesions"},
    )


@MODES
@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 32, 24), (64, 64, 32), (24, 40, 48)])
def test_pairs_have_the_studys_shape_and_ranges(shape: tuple[int, int, int], mode: str) -> None:
    pairs = sample_pairs(build_generator(study(shape, mode)), seed=1, first=0, count=2)
    assert pairs.shape == (2, 2, *shape)
    assert np.abs(pairs[:, 0]).max() <= 1
    assert pairs[:, 1].min() >= 0
    assert pairs[:, 1].max() == 1


@MODES
def test_the_mask_of_a_pair_is_the_laws_for_that_latent_whatever_the_weights(mode: str) -> None:
    latent = latents(5, 0, 4, 32)
    expected = lesion_occupancy(latent[:, -FORM_SIZE:], study().grid.as_grid())
    for seed in (0, 1):
        pairs = build_generator(study(mode=mode), seed)(latent)
        assert torch.equal(pairs[:, 1:], expected)


@MODES
def test_the_image_is_painted_on_that_very_mask(mode: str) -> None:
    """The same code with another lesion gives another image, on the painter's side of the same weights."""
    generator = build_generator(study(mode=mode))
    assert isinstance(generator, TransversalGenerator)
    one = latents(5, 0, 1, 32)
    other = torch.cat([one[:, :-FORM_SIZE], latents(6, 0, 1, 32)[:, -FORM_SIZE:]], dim=1)
    masks = generator(one)[:, 1:]
    assert torch.equal(generator(one)[:, :1], generator.painter(one[:, :-FORM_SIZE], masks))
    assert not torch.equal(generator(one)[:, 0], generator(other)[:, 0])


def test_a_generator_takes_latents_and_nothing_else() -> None:
    assert list(inspect.signature(TransversalGenerator.forward).parameters) == ["self", "latent"]


@MODES
def test_the_mean_of_two_sites_weights_is_a_generator_without_any_hidden_state(mode: str) -> None:
    one, two = build_generator(study(mode=mode), 1), build_generator(study(mode=mode), 2)
    assert not list(one.buffers())  # weights are parameters only, so a buffer would be left behind
    means = {n: (a + weights_of(two).arrays[n]) / 2 for n, a in weights_of(one).arrays.items()}
    load_weights(one, Weights(means))
    pairs = sample_pairs(one, seed=0, first=0, count=3)
    assert np.isfinite(pairs).all()
    assert pairs[0, 0].std() > 0


@MODES
def test_a_volume_depends_on_its_own_latent_only(mode: str) -> None:
    generator = build_generator(study(mode=mode))
    whole = sample_pairs(generator, seed=9, first=0, count=5, batch=4)
    assert np.allclose(whole[3:], sample_pairs(generator, seed=9, first=3, count=2, batch=1), atol=1e-5)
    assert not np.allclose(whole[0], whole[1])


def test_slices_lie_along_the_last_axis_and_differ() -> None:
    generator = build_generator(study((32, 24, 16)))
    assert isinstance(generator, TransversalGenerator)
    codes = generator.painter.slice_codes(latents(0, 0, 2, 32 - FORM_SIZE))
    assert codes.shape == (2, 8, 16)
    assert (codes.std(dim=2) > 0).all()


def test_the_published_plan_has_the_published_slice_codes_at_width_64() -> None:
    """[Bergen et al. 2023]: 2.97 million parameters, 100 numbers a slice, 32 slices."""
    published = tiny_study(
        family="trgan",
        grid={"shape": (64, 64, 32), "spacing_mm": (4.0, 4.0, 4.0)},
        training={"latent_size": 123, "generator_width": 64, "mode": "paper"},
    )
    generator = build_generator(published)
    assert isinstance(generator, TransversalGenerator)
    assert sum(p.numel() for p in generator.painter.slice_codes.parameters()) == pytest.approx(2.97e6, rel=0.01)
