import numpy as np
import pytest

from common.measure.fidelity.comparison import compare_features, correlation_difference, holm
from common.measure.fidelity.radiomics import (
    FEATURES,
    cooccurrence_contrast,
    entropy_bits,
    maximum_diameter_mm,
    radiomics,
    surface_area_mm2,
)


def ball(radius_mm: float, spacing: tuple[float, float, float]) -> np.ndarray:
    half = [int(np.ceil(radius_mm / s)) + 2 for s in spacing]
    axes = [np.arange(-h, h + 1) * s for h, s in zip(half, spacing, strict=True)]
    return sum(x**2 for x in np.meshgrid(*axes, indexing="ij")) <= radius_mm**2


def measured(image: np.ndarray, mask: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> dict[str, float]:
    return dict(zip(FEATURES, radiomics(image[None], mask[None], spacing)[0], strict=True))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.5), (3.3, 3.9, 3.9)])
def test_a_ball_measures_as_its_formulas_say(spacing):
    radius = 9.0 * max(spacing)
    mask = ball(radius, spacing)
    found = measured(np.full(mask.shape, 0.5), mask, spacing)
    assert found["volume_ml"] == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.02)
    assert found["maximum_diameter_mm"] == pytest.approx(2 * radius, rel=0.03)
    assert surface_area_mm2(mask, spacing) == pytest.approx(4 * np.pi * radius**2, rel=0.02)
    assert found["sphericity"] == pytest.approx(1.0, abs=0.03)


def test_a_rod_is_less_of_a_sphere_than_a_ball_and_counting_faces_would_not_do():
    rod = np.zeros((40, 10, 10), dtype=bool)
    rod[2:38, 3:7, 3:7] = True
    image = np.full(rod.shape, 0.5)
    exact = (36 * np.pi * (36 * 16) ** 2) ** (1 / 3) / (2 * 16 + 4 * 4 * 36)
    assert measured(image, rod)["sphericity"] == pytest.approx(exact, rel=0.18)  # the stated error of flat faces
    mask = ball(9.0, (1.0, 1.0, 1.0))
    faces = sum(np.count_nonzero(np.diff(np.pad(mask, 1).astype(int), axis=axis)) for axis in range(3))
    assert faces > 1.4 * 4 * np.pi * 81  # what surface_area_mm2 avoids


def test_maximum_diameter_is_that_of_all_pairs_of_voxels():
    mask = np.random.default_rng(0).random((7, 8, 9)) < 0.05
    spacing = (2.0, 1.0, 0.5)
    points = np.argwhere(mask) * spacing
    expected = max(np.linalg.norm(p - q) for p in points for q in points)
    assert maximum_diameter_mm(mask, spacing) == pytest.approx(expected)


def test_grey_values_inside_the_label_alone_are_measured():
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[:2] = True
    image = np.where(mask, 0.0, 0.9)
    image[0] = 0.2
    image[1] = 0.4
    found = measured(image, mask)
    assert found["mean"] == pytest.approx(0.3)
    assert found["percentile_90"] == pytest.approx(0.4)
    assert found["coefficient_of_variation"] == pytest.approx(0.1 / 0.3)
    assert found["entropy_bits"] == pytest.approx(1.0)


def test_entropy_of_constant_values_is_zero_and_of_even_ones_six_bits():
    assert entropy_bits(np.full(10, 0.3)) == 0.0
    assert entropy_bits((np.arange(6400) % 64 + 0.5) / 64) == pytest.approx(6.0)


def test_contrast_is_that_of_neighbours_counted_one_by_one():
    rng = np.random.default_rng(1)
    image, mask = rng.random((4, 5, 3)), rng.random((4, 5, 3)) < 0.6
    levels = np.minimum((image * 16).astype(int), 15)
    at = np.argwhere(mask)
    squares = [(levels[tuple(p)] - levels[tuple(q)]) ** 2 for p in at for q in at if 0 < np.abs(p - q).max() <= 1]
    assert cooccurrence_contrast(image, mask) == pytest.approx(np.mean(squares))


def test_an_empty_label_is_nan_and_a_single_voxel_has_no_contrast():
    masks = np.zeros((3, 6, 6, 6), dtype=bool)
    masks[1, 2, 2, 2] = True
    masks[2, 1:4, 1:4, 1:4] = True
    rows = radiomics(np.full(masks.shape, 0.5), masks, (1.0, 1.0, 1.0))
    assert np.isnan(rows[0]).all()
    assert np.isnan(rows[1]).tolist() == [name == "cooccurrence_contrast" for name in FEATURES]
    assert np.isfinite(rows[2]).all()
    assert radiomics(np.zeros((0, 6, 6, 6)), masks[:0], (1.0, 1.0, 1.0)).shape == (0, 8)


def test_holm_is_that_of_the_paper_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_equal_distributions_are_called_different_in_at_most_five_percent_and_a_shift_is_named():
    names = ("a", "b", "c")
    rng = np.random.default_rng(0)
    alarms = [
        bool(compare_features(rng.normal(size=(40, 3)), rng.normal(size=(50, 3)), names).differ()) for _ in range(200)
    ]
    assert np.mean(alarms) <= 0.075  # 5 % and two deviations of 200 draws
    shifted = rng.normal([0.0, 1.5, 0.0], 1.0, (50, 3))
    assert compare_features(rng.normal(size=(40, 3)), shifted, names).differ() == ("b",)


def test_scans_without_a_label_are_counted_and_left_out():
    rng = np.random.default_rng(0)
    real, synthetic = rng.normal(size=(30, 2)), rng.normal(size=(30, 2))
    holes = np.concatenate([synthetic, np.full((4, 2), np.nan)])
    with_holes, without = (compare_features(real, s, ("a", "b")) for s in (holes, synthetic))
    assert (with_holes.left_out_real, with_holes.left_out_synthetic) == (0, 4)
    assert with_holes.tests == without.tests
    assert with_holes.correlation_difference == pytest.approx(without.correlation_difference)
    nobody = compare_features(real, np.full((5, 2), np.nan), ("a", "b"))
    assert [t.p_adjusted for t in nobody.tests] == [None, None]
    assert nobody.correlation_difference is None
    assert nobody.differ() == ()


def test_correlations_that_turn_round_are_two_apart_and_constants_say_nothing():
    x = np.arange(20.0)
    rising, falling = np.stack([x, x**3, x * 0], axis=1), np.stack([x, -x, x], axis=1)
    assert correlation_difference(rising, falling) == pytest.approx(2.0)
    assert correlation_difference(rising, rising) == pytest.approx(0.0)
    assert correlation_difference(rising[:, 2:], falling[:, 2:]) is None
