import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.attacks.density_ratio import DensityRatio, log_density, scott_width
from common.attacks.features import Embedding, views
from common.attacks.templates import pool
from common.errors import DataError
from tests.common.attacks.disguises import disguised
from tests.common.attacks.memoriser import auc, phantoms, tpr_at_1_percent

PEOPLE = torch.from_numpy(phantoms(180))
MEMBERS, STRANGERS, INDEPENDENT, REFERENCE = PEOPLE.split([10, 20, 75, 75])


def against(name: str) -> DensityRatio:
    copies = torch.from_numpy(disguised(MEMBERS.numpy(), name, seed=0))
    return DensityRatio(pool(torch.cat([INDEPENDENT, copies])), pool(REFERENCE))


@pytest.mark.parametrize("name", ["noise 0.10", "gain and offset", "flip"])
def test_members_whose_disguised_copies_are_synthetic_are_told_from_strangers(name):
    score = against(name)
    members, strangers = [score.raw(x) for x in MEMBERS], [score.raw(x) for x in STRANGERS]
    assert tpr_at_1_percent(members, strangers) >= 0.8


def test_synthetic_volumes_of_strangers_separate_nobody():
    score = DensityRatio(pool(INDEPENDENT), pool(REFERENCE))
    found = auc([score.raw(x) for x in MEMBERS], [score.raw(x) for x in STRANGERS])
    assert 0.2 < found < 0.8  # two standard deviations of an AUC of 10 against 20 are 0.23


def test_an_own_copy_counts_as_one_more_synthetic_volume():
    score = DensityRatio(pool(INDEPENDENT), pool(REFERENCE))
    copies = torch.from_numpy(disguised(STRANGERS.numpy(), "noise 0.02", seed=0))
    highest = max(score.raw(x) for x in STRANGERS[5:])
    assert all(score.raw(x, c) > highest for x, c in zip(STRANGERS[:5], copies, strict=False))
    assert score.raw(STRANGERS[0], INDEPENDENT[0]) == pytest.approx(score.raw(STRANGERS[0]), abs=0.1)


def test_nothing_but_the_reference_density_depends_on_the_reference_set():
    first, second = (DensityRatio(pool(INDEPENDENT), pool(r)) for r in (REFERENCE, REFERENCE.flip(0)))
    assert first.raw(STRANGERS[0]) == pytest.approx(second.raw(STRANGERS[0]), abs=1e-4)
    embedding = Embedding.fit(pool(INDEPENDENT))
    assert torch.equal(embedding(pool(INDEPENDENT)), first._embedding(pool(INDEPENDENT)))


def test_components_are_white_over_the_synthetic_volumes():
    z = Embedding.fit(pool(INDEPENDENT), dimensions=16)(pool(INDEPENDENT))
    assert torch.allclose(z.mean(dim=0), torch.zeros(16), atol=1e-3)
    assert torch.allclose(z.T @ z / len(z), torch.eye(16), atol=1e-2)


def test_the_unmoved_and_the_mirrored_scan_are_among_the_views():
    scan = STRANGERS[0]
    found = views(scan)
    for wanted in (scan[:1], scan[:1].flip(1)):
        assert any(torch.allclose(wanted, view, atol=1e-6) for view in found)


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 8))
def test_log_density_is_the_log_of_the_mean_gaussian_kernel(seed, dimensions, count):
    rng = np.random.default_rng(seed)
    queries, centres = rng.normal(size=(3, dimensions)), rng.normal(size=(count, dimensions))
    kernels = np.exp(-((queries[:, None] - centres) ** 2).sum(axis=2) / (2 * 0.8**2))
    found = float(log_density(torch.from_numpy(queries), torch.from_numpy(centres), 0.8))
    assert found == pytest.approx(np.log(kernels.mean()), abs=1e-6)
    assert 0 < scott_width(count, dimensions) <= 1


def test_volumes_all_alike_and_blank_scans_have_finite_scores():
    collapsed = DensityRatio(pool(INDEPENDENT[:1]).expand(80, -1, -1, -1, -1), pool(REFERENCE))
    blank = DensityRatio(torch.zeros(80, 3, 16, 16, 16), pool(REFERENCE))
    for score in (collapsed, blank, DensityRatio(pool(INDEPENDENT), pool(REFERENCE))):
        for scan in (STRANGERS[0], torch.zeros(3, 16, 16, 16), torch.full((3, 16, 16, 16), 1e6)):
            assert np.isfinite(score.raw(scan))


def test_too_few_or_damaged_volumes_are_refused():
    with pytest.raises(DataError, match="reference set has 10"):
        DensityRatio(pool(INDEPENDENT), pool(REFERENCE[:10]))
    with pytest.raises(DataError, match="synthetic set has 10"):
        DensityRatio(pool(INDEPENDENT[:10]), pool(REFERENCE))
    with pytest.raises(DataError, match="reference set"):
        DensityRatio(pool(INDEPENDENT), pool(REFERENCE) * float("nan"))
    with pytest.raises(DataError, match="synthetic set"):
        DensityRatio(pool(INDEPENDENT) * float("nan"), pool(REFERENCE))
