"""Public features: the same everywhere, bounded in number and in length, and smooth enough to fit a generator to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import SettingsError
from common.measure.features import CLIP_NORM, feature_map, histogram, surroundings, volumes
from common.phantom.draw import public_phantoms
from common.settings.load import load_study, settings_yaml
from tests.tiny_studies import tiny_study
from tests.warmed_study import FEATURES, WARM_UP, warmed_map, warmed_study


def phantoms(count: int, seed: int = 9) -> torch.Tensor:
    return torch.from_numpy(public_phantoms(warmed_study(), seed, count).astype(np.float32))


def pair_of(image: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([image, *labels])[None]


def test_map_has_as_many_features_as_the_settings_say():
    assert warmed_map()(phantoms(2)).shape == (2, FEATURES)
    assert warmed_study().warm_up.features(1) == FEATURES


def test_map_follows_from_the_study_alone():
    here, pairs = warmed_map(), phantoms(3)
    # Another epsilon is another study, so nothing is remembered; but it asks the same.
    there = feature_map(warmed_study(privacy={"target_epsilon": 3.0}))
    assert there is not here
    assert torch.equal(here(pairs), there(pairs))


def test_a_study_without_a_warm_up_has_no_map():
    with pytest.raises(ValueError, match="no warm-up"):
        feature_map(tiny_study())


def test_other_phantoms_lie_near_zero_and_are_about_as_long_as_the_clip_norm():
    rows = warmed_map()(phantoms(24))
    assert 0.5 * CLIP_NORM < float(rows.norm(dim=1).median()) < 1.5 * CLIP_NORM
    assert float(rows.mean(dim=0).norm()) < 0.5 * CLIP_NORM


def test_features_are_differentiable_in_every_voxel():
    torch.manual_seed(0)
    pairs = pair_of(0.8 * torch.rand(4, 4, 4, dtype=torch.float64) - 0.4, 0.1 + 0.7 * torch.rand(4, 4, 4).double())
    pairs.requires_grad_()
    for function in (lambda x: surroundings(x, 2), lambda x: histogram(x, 5), lambda x: volumes(x, 4)):
        assert torch.autograd.gradcheck(function, (pairs,))


def test_whole_map_passes_a_gradient_to_image_and_labels():
    pairs = phantoms(2).requires_grad_()
    warmed_map()(pairs).square().sum().backward()
    assert (pairs.grad[:, 0] != 0).float().mean() > 0.5
    assert (pairs.grad[:, 1] != 0).float().mean() > 0.5


def test_surroundings_are_the_grey_values_beside_the_label():
    image, label = torch.zeros(6, 6, 6), torch.zeros(6, 6, 6)
    label[2, 3, 3] = 1.0
    image[2, 3, 3], image[3, 3, 3], image[2, 3, 1] = 0.5, -0.25, 1.0
    found = surroundings(pair_of(image, label), 2)[0].tolist()
    assert len(found) == 1 + 2 * 26
    assert found[0] == 0.5
    assert sorted(value for value in found[1:] if value) == [-0.25, 1.0]


def test_surroundings_go_on_beyond_the_border_and_an_absent_label_has_none():
    image = torch.full((4, 4, 4), 0.5)
    corner = torch.zeros(4, 4, 4)
    corner[0, 0, 0] = 1.0
    assert surroundings(pair_of(image, corner), 1)[0].tolist() == pytest.approx([0.5] * 27)
    assert surroundings(pair_of(image, torch.zeros(4, 4, 4)), 1)[0].tolist() == [0.0] * 27


def test_histogram_counts_every_voxel_once_by_tissue_and_grey_value():
    image, label = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    image[0], image[1] = -1.0, 0.5  # 0.5 lies half-way between the bins at 0 and 1
    label[1] = 1.0
    assert histogram(pair_of(image, label), 3)[0].tolist() == pytest.approx([0.5, 0, 0, 0, 0.25, 0.25])
    beyond = histogram(pair_of(torch.full((2, 2, 2), 7.0), label), 3)[0]
    assert float(beyond.sum()) == pytest.approx(1.0)


def test_volumes_are_logarithmic_and_hold_what_is_smaller_or_larger_than_the_bins():
    label = torch.full((2, 2, 2), 0.01)
    assert volumes(pair_of(torch.zeros(2, 2, 2), label), 5)[0].tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-5)
    assert volumes(pair_of(torch.zeros(2, 2, 2), 0 * label), 5)[0].tolist() == pytest.approx([1, 0, 0, 0, 0], abs=1e-5)


@pytest.mark.parametrize(
    "warm_up",
    [
        {**WARM_UP, "components": 60},  # 120, and the rest is more than 8
        {**WARM_UP, "components": 0, "surroundings": 0, "histogram_bins": 0, "volume_bins": 0},
        {**WARM_UP, "histogram_bins": 1},
    ],
)
def test_more_than_128_features_none_at_all_or_a_single_bin_are_refused(tmp_path, warm_up):
    path = tmp_path / "study.yaml"
    path.write_text(settings_yaml(warmed_study(warm_up=warm_up)))
    with pytest.raises(SettingsError, match="warm_up"):
        load_study(path)
