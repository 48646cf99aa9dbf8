"""The release function of an answer on two cohorts that differ in one patient, 100,000 times (audit notes K12)."""

import math

import numpy as np
import pytest
from scipy.stats import beta

from client.randomness import SecureStream
from client.scoring.score import noised_counts
from common.errors import PolicyRefusal
from common.measure.audit_plan import Group

RUNS = 100_000
COUNT = 7  # of the bin that the patient falls into
MISTAKE = 1e-4  # probability that one bound does not hold; about 100 are looked at


def released(count: int, epsilon: float, label: str) -> np.ndarray:
    """(RUNS,) answers for a bin with this count."""
    counts = np.full(RUNS, count)
    noise = SecureStream.from_seed(31, label)
    return np.array(noised_counts("fused", Group.MEMBER_A, counts, epsilon, noise).counts)


def violations(one: np.ndarray, other: np.ndarray, epsilon: float) -> list[tuple[str, int]]:
    """Sets of answers, half-lines and points, that are surely likelier than e^epsilon times under the neighbour.

    Bounds of Clopper and Pearson on either probability.
    """
    found = []
    for name, holds in (("at most", np.less_equal), ("at least", np.greater_equal), ("exactly", np.equal)):
        for answer in range(COUNT - 8, COUNT + 9):
            k, m = int(holds(one, answer).sum()), int(holds(other, answer).sum())
            low = beta.ppf(MISTAKE, k, RUNS - k + 1) if k else 0.0
            high = beta.ppf(1 - MISTAKE, m + 1, RUNS - m) if m < RUNS else 1.0
            if low > math.exp(epsilon) * high:
                found.append((name, answer))
    return found


@pytest.mark.parametrize("epsilon", [0.25, 0.5, 1.0, 2.0])
def test_no_set_of_answers_is_likelier_by_more_than_epsilon_with_a_patient_than_without(epsilon):
    with_patient, without = released(COUNT, epsilon, "with"), released(COUNT - 1, epsilon, "without")
    assert violations(with_patient, without, epsilon) == []
    assert violations(without, with_patient, epsilon) == []


@pytest.mark.parametrize("epsilon", [0.25, 0.5, 1.0, 2.0])
def test_noise_for_a_little_more_epsilon_than_was_paid_is_found(epsilon):
    with_patient, without = released(COUNT, 1.15 * epsilon, "with"), released(COUNT - 1, 1.15 * epsilon, "without")
    assert violations(with_patient, without, epsilon)


def test_an_answer_without_noise_does_not_leave():
    with pytest.raises(PolicyRefusal):
        noised_counts("fused", Group.MEMBER_A, np.array([3, 4]), None, SecureStream.from_seed(1))
