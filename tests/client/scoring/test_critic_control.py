import numpy as np
import pytest

from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.scoring.critic_control import auc_lower_bound, critic_tells, randomised_response
from client.training.state import GameState
from tests.stored_pairs import noise_pairs
from tests.tiny_studies import tiny_study

STUDY = tiny_study()


def cohort(brightness: float) -> Cohort:
    """Twenty members, brighter by this much than twenty held-out patients."""
    scans = {}
    for i in range(40):
        scan = noise_pairs(i, 1)
        scan[:, 0] = 0.2 * scan[:, 0] + (brightness if i < 20 else 0.0)
        scans[f"p{i:02}"] = scan
    names = sorted(scans)
    return Cohort.from_patients(scans, commit_split(names[:20], names[20:], SecureStream.from_seed(0)))


def seeing_brightness() -> dict:
    """The kept state of a critic whose read-out is positive in every input."""
    state = GameState.start(STUDY, None)
    for parameter in state.critic.parameters():
        parameter.data.fill_(0.01)
    return state.tensors()


def test_a_critic_that_separates_members_tells_and_one_that_does_not_does_not():
    assert critic_tells(STUDY, seeing_brightness(), cohort(0.5), "cpu")
    assert not critic_tells(STUDY, seeing_brightness(), cohort(0.0), "cpu")


def test_a_group_without_patients_tells_nothing():
    everybody = cohort(0.5)
    scans = {p: everybody.scans(p) for p in everybody.members}
    alone = Cohort.from_patients(scans, commit_split(everybody.members, [], SecureStream.from_seed(0)))
    assert not critic_tells(STUDY, seeing_brightness(), alone, "cpu")


def test_the_lower_bound_of_few_patients_is_cautious():
    rng = np.random.default_rng(0)
    few, many = (auc_lower_bound(rng.normal(2, 1, n), rng.normal(0, 1, n)) for n in (5, 500))
    assert few < many
    assert 0.85 < many < 0.93  # the truth is 0.921


@pytest.mark.parametrize("truth", [True, False])
def test_the_bit_is_true_as_often_as_epsilon_says(truth):
    stream = SecureStream.from_seed(1)
    said = np.mean([randomised_response(truth, 1.0, stream) for _ in range(4000)])
    assert said == pytest.approx(0.731 if truth else 0.269, abs=0.03)
