import torch

from common.attacks.label_size import LabelSize
from common.attacks.templates import pool
from tests.stored_pairs import noise_pairs


def boxes(seed: int, sizes) -> torch.Tensor:
    """Pairs whose image shows a box on noise of its own, and whose label is the box."""
    pairs = torch.from_numpy(noise_pairs(seed, len(sizes)))
    pairs[:, 1] = 0
    for pair, size in zip(pairs, sizes, strict=True):
        pair[1, 3 : 3 + size, 3:13, 3:13] = 1
        pair[0] = 0.2 * pair[0] + pair[1]
    return pairs.clamp(-1, 1)


def test_the_size_of_a_copied_patient_is_guessed_and_that_of_a_stranger_is_not():
    people = boxes(1, [5, 7, 9])
    attack = LabelSize(pool(people))
    assert all(attack.right(person) for person in people)
    assert not attack.right(boxes(2, [11])[0])


def test_a_guess_must_be_within_three_per_cent():
    person = boxes(3, [8])
    close = person.clone()
    close[0, 1, 3, 3, 3] = 0  # 799 voxels of 800
    far = boxes(3, [9])
    assert LabelSize(pool(person)).right(close[0])
    assert not LabelSize(pool(person)).right(far[0])
