"""Whether the phantoms have the properties of what they stand for. Numbers are those of real scans, widened."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.phantom.arteries import draw_pose, grow
from common.phantom.draw import draw, patient_rng
from common.phantom.fields import blur, smooth_fields
from common.phantom.hippocampus import ANTERIOR, POSTERIOR
from common.phantom.scanner import site_scanner
from common.settings.study import PhantomKind
from common.volume.volume import Grid, Volume

ANGIO = Grid(shape=(32, 32, 32), spacing_mm=(1.5, 1.5, 1.5))
T1 = Grid(shape=(64, 64, 64), spacing_mm=(1.0, 1.0, 1.0))


def cohort(kind: PhantomKind, grid: Grid, count: int) -> list[tuple[Volume, Volume]]:
    return [draw(kind, patient_rng(kind, 11, 0, i), site_scanner(11, 0), grid) for i in range(count)]


def scaled(image: Volume) -> NDArray[np.float32]:
    low, high = np.percentile(image.voxels, [1, 99])
    return np.clip((image.voxels - low) / (high - low), 0, 1)


def test_vessels_take_three_to_eight_percent_of_the_volume():
    shares = [label.voxels.mean() for _, label in cohort(PhantomKind.VESSELS, ANGIO, 30)]
    assert min(shares) > 0.025
    assert max(shares) < 0.095
    assert np.std(shares) > 0.004


def test_vessels_are_much_brighter_than_what_surrounds_them():
    for image, label in cohort(PhantomKind.VESSELS, ANGIO, 12):
        grey, vessel = scaled(image), label.voxels > 0
        assert grey[vessel].mean() > 1.5 * grey[~vessel].mean()
        assert np.median(grey[vessel]) > np.percentile(grey[~vessel], 90)


def test_vessels_are_trees_and_not_scattered_voxels():
    for _, label in cohort(PhantomKind.VESSELS, ANGIO, 12):
        parts, count = ndimage.label(label.voxels, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        assert count <= 12
        assert np.sort(sizes)[-3:].sum() > 0.85 * label.voxels.sum()


def test_inflow_fades_from_thick_vessels_to_thin_ones():
    fading = []
    for image, label in cohort(PhantomKind.VESSELS, ANGIO, 12):
        depth = ndimage.distance_transform_edt(label.voxels)
        fading.append(image.voxels[depth >= 2].mean() / image.voxels[depth == 1].mean())
    assert min(fading) > 1.1


def test_patients_vary_one_anatomy_and_are_told_apart_by_their_vessels():
    labels = [label.voxels.ravel() for _, label in cohort(PhantomKind.VESSELS, ANGIO, 40)]
    overlaps = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in combinations(labels, 2)]
    assert 0.25 < np.mean(overlaps) < 0.5
    assert max(overlaps) < 0.7
    half, other = np.mean(labels[:20], axis=0), np.mean(labels[20:], axis=0)
    assert np.corrcoef(half, other)[0, 1] > 0.8  # vessels scattered at random: 0.36
    assert np.mean(labels, axis=0).max() > 0.7


def test_the_carotid_rises_from_dark_bone_and_branches_reach_the_other_borders():
    drawn = cohort(PhantomKind.VESSELS, ANGIO, 20)
    for image, label in drawn:
        outside = image.voxels * (1 - label.voxels)
        assert label.voxels[:, :, 0].any()
        assert outside[16:, 16:, :3].mean() < 0.6 * outside[:, :, 20:].mean()
    reached = np.mean([label.voxels for _, label in drawn], axis=0)
    lateral, medial = reached[:2].max(), reached[-2:].max()
    anterior, top = reached[:, -2:].max(), reached[:, :, -2:].max()
    assert min(lateral, medial, anterior, top) > 0.1


def test_some_patients_lack_a_branch_or_have_one_more():
    rng, field = np.random.default_rng(2), np.array([48.0, 48.0, 48.0])
    points = {len(grow(rng, draw_pose(rng), field).radii) for _ in range(20)}
    assert len(points) > 10


def test_hippocampus_labels_have_the_size_and_place_of_real_ones():
    for _, label in cohort(PhantomKind.HIPPOCAMPUS, T1, 25):
        anterior, posterior = label.voxels == ANTERIOR, label.voxels == POSTERIOR
        assert 700 < anterior.sum() < 4000  # mm^3; real 1188 to 2482
        assert 600 < posterior.sum() < 4000  # real 1059 to 2169
        centre = (np.array(label.shape) - 1) / 2
        off = np.argwhere(label.voxels > 0).mean(axis=0) - centre
        assert np.abs(off).max() < 9
        assert max(label.shape) < 64  # a crop around the structure, not the whole field


def test_hippocampus_runs_forward_and_down_with_its_anterior_part_in_front():
    for _, label in cohort(PhantomKind.HIPPOCAMPUS, T1, 25):
        at = np.argwhere(label.voxels > 0).astype(float)
        axis = np.linalg.svd(at - at.mean(axis=0), full_matrices=False)[2][0]
        axis *= np.sign(axis[1])
        assert axis[1] > 0.75  # anterior
        assert -0.7 < axis[2] < -0.05  # and downwards
        head, body = np.argwhere(label.voxels == ANTERIOR), np.argwhere(label.voxels == POSTERIOR)
        assert head[:, 1].min() > body[:, 1].max()  # parted by a coronal plane


def test_hippocampal_labels_stay_off_the_border_of_the_crop():
    for _, label in cohort(PhantomKind.HIPPOCAMPUS, T1, 25):
        inner = label.voxels[1:-1, 1:-1, 1:-1]
        assert inner.sum() == label.voxels.sum()


def test_hippocampus_is_grey_between_dark_fluid_and_bright_white_matter():
    for image, label in cohort(PhantomKind.HIPPOCAMPUS, T1, 12):
        grey, inside = scaled(image), label.voxels > 0
        assert 0.28 < grey[inside].mean() < 0.52  # real 0.33 to 0.46
        below = np.roll(inside, -2, axis=2) & ~inside
        above_white = np.percentile(grey, 75)
        assert grey[below].mean() > grey[inside].mean() + 0.1  # white matter of the gyrus lies below
        assert above_white > 0.65
        assert np.percentile(grey, 8) < 0.25  # fluid


def test_smooth_fields_have_unit_variance_and_the_width_that_was_asked_for():
    fields = smooth_fields(np.random.default_rng(0), 200, (16, 12, 10), (1.0, 1.0, 1.0), 4.0)
    assert fields.shape == (200, 16, 12, 10)
    assert abs(fields.mean()) < 0.05
    assert np.abs(fields.var(axis=0) - 1).max() < 0.5  # every voxel, borders included
    next_to = (fields[:, 1:] * fields[:, :-1]).mean()
    far = (fields[:, 12:] * fields[:, :-12]).mean()
    assert next_to > 0.8
    assert abs(far) < 0.1


def test_blur_keeps_the_mean_of_a_flat_volume_and_spreads_a_point():
    flat = np.full((9, 8, 7), 3.0, dtype=np.float32)
    assert np.allclose(blur(flat, (1.0, 0.5, 2.0)), 3.0, atol=1e-5)
    point = np.zeros((15, 15, 15), dtype=np.float32)
    point[7, 7, 7] = 1.0
    expected = ndimage.gaussian_filter(point, 1.0, truncate=6)
    assert np.allclose(blur(point, (1.0, 1.0, 1.0)), expected, atol=1e-4)
