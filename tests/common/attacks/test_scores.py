import numpy as np
import pytest
import torch

from client.randomness import SecureStream
from common.attacks.disguise import disguise
from common.attacks.near_copy import NearCopy, moved_queries, templates
from common.attacks.nearest import Nearest
from common.attacks.templates import VARIANTS, centre_windows, pool, variants

SCORERS = [NearCopy, Nearest]


def anatomies(seed: int, n: int, side: int = 32) -> np.ndarray:
    """(n, 2, side, side, side): random patterns a few voxels wide, and the label of their bright part."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(n, 1, 11, 11, 11)).astype(np.float32))
    image = torch.nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear", align_corners=True)
    image = (image / 3).clamp(-1, 1)
    return torch.cat([image, (image > 0.3).float()], dim=1).numpy()


def pooled(volumes: np.ndarray) -> torch.Tensor:
    return pool(torch.from_numpy(volumes))


def test_variants_hold_the_centre_every_shift_and_the_mirror_image():
    scan = pooled(anatomies(0, 1))[0]
    found = variants(scan)
    assert found.shape == (VARIANTS, 2, 14, 14, 14)
    for wanted in (centre_windows(scan[None])[0], scan[:, :14, 2:, 1:15], scan.flip(1)[:, 2:, :14, :14]):
        assert any(torch.equal(wanted, window) for window in found)


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_disguised_copy_among_the_candidates_is_scored_above_every_stranger(scorer):
    people, strangers = anatomies(1, 12), anatomies(2, 40)
    copies = [disguise(p, SecureStream.from_seed(i)) for i, p in enumerate(people)]
    score = scorer(torch.cat([pooled(anatomies(3, 28)), pooled(np.stack(copies))]), pooled(anatomies(4, 40)))
    null = max(score.raw(s) for s in torch.from_numpy(strangers))
    caught = np.mean([score.raw(p) > null for p in torch.from_numpy(people)])
    assert caught >= 0.9


@pytest.mark.parametrize("scorer", SCORERS)
def test_an_own_copy_counts_as_one_more_candidate(scorer):
    person, copy = torch.from_numpy(anatomies(5, 2))
    candidates, reference = pooled(anatomies(6, 8)), pooled(anatomies(7, 9))
    beside = scorer(torch.cat([candidates, candidates[:1]]), reference).raw(person, copy)
    if scorer is NearCopy:  # the other score also takes its public scale from the candidates
        assert beside == scorer(torch.cat([candidates, pool(copy[None])]), reference).raw(person)
    assert beside >= scorer(torch.cat([candidates, candidates[:1]]), reference).raw(person)


@pytest.mark.parametrize("scorer", SCORERS)
def test_swapping_candidates_and_reference_turns_the_score_around(scorer):
    a, b, people = pooled(anatomies(8, 10)), pooled(anatomies(9, 10)), torch.from_numpy(anatomies(10, 5))
    forward, backward = scorer(a, b), scorer(b, a)
    for person in people:
        assert forward.raw(person) == pytest.approx(-backward.raw(person), abs=1e-5)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("side", [16, 24, 48])
def test_scores_work_on_every_grid_and_on_a_blank_scan(scorer, side):
    score = scorer(pooled(anatomies(11, 3, side)), pooled(anatomies(12, 3, side)))
    assert np.isfinite(score.raw(torch.zeros(2, side, side, side)))


@pytest.mark.parametrize("shift", [(1, 0, 0), (-1, 2, 1), (2, -2, -1)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_near_copy_undoes_every_shift_of_up_to_two_voxels_and_the_mirror(shift, mirrored):
    """Odd shifts are half a pooled voxel: a search on the pooled grid alone finds less than nine tenths of them."""
    volume = torch.from_numpy(anatomies(20, 1, side=40))[0, 0]
    person = volume[4:36, 4:36, 4:36]
    moved = volume[tuple(slice(4 + s, 36 + s) for s in shift)]
    copy = (moved.flip(0) if mirrored else moved)[None, None]
    assert float((moved_queries(person) @ templates(pool(copy)).T).max()) > 0.97


def test_moved_queries_hold_the_templates_own_window_unmoved():
    volume = torch.from_numpy(anatomies(21, 1))
    assert float((moved_queries(volume[0, 0]) @ templates(pool(volume)).T).max()) == pytest.approx(1, abs=1e-5)


def test_queries_and_templates_stay_on_the_device_of_the_scan():
    """Whatever device: the meta device refuses to be mixed with another, as a GPU does."""
    assert moved_queries(torch.empty(32, 24, 32, device="meta")).device.type == "meta"
    assert templates(torch.empty(3, 2, 16, 16, 16, device="meta")).device.type == "meta"


def test_the_most_similar_candidate_is_named_for_the_sites_reviewer():
    people = torch.from_numpy(anatomies(22, 3))
    similarity, number = NearCopy(pool(people), pool(people[:1])).most_similar(people[2])
    assert (round(similarity, 4), number) == (1.0, 2)


def test_near_copy_ignores_gain_and_offset_of_the_grey_values():
    person = torch.from_numpy(anatomies(13, 1))[0]
    brighter = person.clone()
    brighter[0] = 0.7 * brighter[0] + 0.2
    score = NearCopy(pooled(anatomies(14, 6)), pooled(anatomies(15, 6)))
    assert score.raw(brighter) == pytest.approx(score.raw(person), abs=1e-4)


def test_a_disguise_changes_the_scan_keeps_its_range_and_moves_the_labels_along():
    scan = anatomies(16, 1)[0]
    seen = [disguise(scan, SecureStream.from_seed(s)) for s in range(8)]
    for other in seen:
        assert other.shape == scan.shape
        assert np.abs(other[0]).max() <= 1
        assert set(np.unique(other[1])) <= {0.0, 1.0}
        assert np.corrcoef(other[0].ravel(), other[1].ravel())[0, 1] > 0.4  # 0.5 before noise and gain
    assert len({o.tobytes() for o in seen}) == 8
