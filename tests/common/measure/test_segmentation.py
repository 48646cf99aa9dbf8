import numpy as np
import pytest
import torch

from common.measure.segmentation import (
    dice,
    dice_per_patient,
    labels_of,
    load_segmenter,
    segment,
    train_segmenter,
)


def balls(*, seed: int, count: int, size: int = 16) -> np.ndarray:
    """(count, 2, size, size, size): one bright ball on a dark, noisy ground."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(size),) * 3, indexing="ij")
    pairs = np.zeros((count, 2, size, size, size), dtype=np.float32)
    for pair in pairs:
        centre = rng.uniform(0.4 * size, 0.6 * size, 3)
        distance = np.sqrt(sum((x - c) ** 2 for x, c in zip(axes, centre, strict=True)))
        pair[1] = np.clip(0.27 * size - distance + 0.5, 0, 1)
        pair[0] = np.clip(1.2 * pair[1] - 0.6 + rng.normal(0, 0.1, pair[1].shape), -1, 1)
    return pairs


@pytest.fixture(scope="module")
def trained():
    return train_segmenter(balls(seed=1, count=12), labels=1, steps=25, seed=3)


def test_a_trained_segmenter_finds_what_it_never_saw_and_an_untrained_one_does_not(trained):
    unseen = balls(seed=2, count=6)
    untrained = train_segmenter(balls(seed=1, count=12), labels=1, steps=0, seed=3)
    assert dice_per_patient(trained, unseen, labels=1).mean() > 0.85
    assert dice_per_patient(untrained, unseen, labels=1).mean() < 0.5


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    pairs = balls(seed=1, count=4, size=8)
    first, again, other = (train_segmenter(pairs, labels=1, steps=2, seed=s).digest for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_training_leaves_the_global_generators_alone():
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train_segmenter(balls(seed=1, count=2, size=8), labels=1, steps=1, seed=0)
    assert torch.equal(torch_before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_scans_stored_in_half_precision_give_the_same_labels(trained):
    pairs = balls(seed=4, count=3)
    half = pairs.astype(np.float16)
    same = segment(trained, half[:, 0], labels=1) == segment(trained, half[:, 0].astype(np.float32), labels=1)
    assert same.all()


def test_dice_of_hand_counted_masks():
    truth = np.zeros((3, 4, 1, 1), dtype=np.uint8)
    found = truth.copy()
    truth[0, :2], found[0, 1:3] = 1, 1  # two and two voxels, one shared: 2 * 1 / 4
    truth[1, :3] = 1  # nothing found: 0
    # third scan: neither holds the label: 1
    assert dice(found, truth, labels=2)[:, 0].tolist() == [0.5, 0.0, 1.0]
    assert dice(found, truth, labels=2)[:, 1].tolist() == [1.0, 1.0, 1.0]


def test_the_most_likely_label_counts_the_background_as_what_is_left_over():
    pair = np.zeros((1, 3, 4, 1, 1), dtype=np.float32)
    pair[0, 1] = np.reshape([0.6, 0.3, 0.3, 0.0], (4, 1, 1))
    pair[0, 2] = np.reshape([0.4, 0.5, 0.2, 0.0], (4, 1, 1))
    assert labels_of(pair).ravel().tolist() == [1, 2, 0, 0]


def test_left_and_right_are_never_swapped_in_training():
    """Label 1 is the ball on one side, label 2 its mirror image: only the side tells them apart."""
    rng = np.random.default_rng(0)
    pairs = np.zeros((8, 3, 16, 16, 16), dtype=np.float32)
    pairs[:, 1, 2:7, 5:11, 5:11] = 1
    pairs[:, 2, 9:14, 5:11, 5:11] = 1
    pairs[:, 0] = pairs[:, 1:].sum(axis=1) - 0.5 + rng.normal(0, 0.05, (8, 16, 16, 16))
    weights = train_segmenter(pairs, labels=2, steps=40, seed=0)
    assert dice_per_patient(weights, pairs, labels=2).min() > 0.7


def test_weights_of_another_network_are_refused(trained):
    with pytest.raises(ValueError, match="not the weights of a segmenter for 2 labels"):
        load_segmenter(trained, 2)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8, 8), (0, 2, 8, 8, 8), (2, 8, 8, 8)])
def test_pairs_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="pairs must be"):
        train_segmenter(np.zeros(shape, dtype=np.float32), labels=1, steps=1, seed=0)
