"""The ladder of critic steps: it climbs for a critic that cannot tell, and looks at fakes only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.training.ladder import GRACE, RUNGS, TOO_WEAK, Ladder, accuracy_on_fakes
from common.errors import IntegrityError


def climbed(accuracies, grace=5, ladder=None):
    ladder = ladder or Ladder()
    steps = []
    for accuracy in accuracies:
        ladder = ladder.after(accuracy, grace=grace)
        steps.append(ladder.critic_steps)
    return steps


def test_a_critic_that_guesses_gets_more_steps_after_each_grace():
    assert climbed([0.5] * 13, grace=3) == [1, 1, 1, 2, 2, 2, 2, 5, 5, 5, 5, 10, 10]


def test_a_critic_that_tells_fakes_keeps_its_rung():
    assert set(climbed([0.7] * 1000)) == {1}


def test_a_critic_is_judged_by_the_published_threshold():
    assert TOO_WEAK == 0.6
    assert climbed([TOO_WEAK - 0.01] * 6)[-1] == 2
    assert climbed([TOO_WEAK + 0.01] * 300)[-1] == 1


def test_a_good_start_is_not_taken_for_a_bad_one_by_an_average_that_begins_at_zero():
    assert climbed([0.95] * 10, grace=0) == [1] * 10


def test_a_critic_that_weakens_is_noticed_only_when_its_average_falls():
    good, bad = [0.9] * 200, [0.4] * 200
    steps = climbed(good + bad)
    assert set(steps[:200]) == {1}
    assert steps[205] == 1  # five bad steps are no trend
    assert steps[-1] >= 2


def test_published_grace_is_two_hundred_generator_steps():
    ladder = Ladder()
    for _ in range(GRACE):
        ladder = ladder.after(0.5)
    assert (GRACE, ladder.critic_steps, ladder.after(0.5).critic_steps) == (200, 1, 2)


def test_the_top_rung_is_the_last():
    top = Ladder(rung=len(RUNGS) - 1)
    assert climbed([0.0] * 20, grace=0, ladder=top) == [RUNGS[-1]] * 20


@given(st.lists(st.floats(0, 1), max_size=60), st.integers(0, 60), st.integers(0, 10))
def test_a_stored_ladder_goes_on_exactly_where_it_was(accuracies, at, grace):
    ladder, through = Ladder(), Ladder()
    for number, accuracy in enumerate(accuracies):
        if number == at:
            through = Ladder.restore({**through.tensors(), "critic.weight": torch.zeros(3)})
        ladder, through = ladder.after(accuracy, grace=grace), through.after(accuracy, grace=grace)
    assert ladder == through


@pytest.mark.parametrize(
    "changes",
    [
        {"ladder.rung": torch.tensor(99)},
        {"ladder.rung": torch.tensor(-1)},
        {"ladder.average": torch.tensor(float("nan"))},
        {"ladder.seen": torch.tensor([1, 2])},
        {"ladder.seen": torch.tensor(-3)},
    ],
)
def test_a_damaged_ladder_is_refused(changes):
    with pytest.raises(IntegrityError, match="ladder"):
        Ladder.restore({**Ladder(rung=2, average=0.25, seen=7).tensors(), **changes})
    with pytest.raises(IntegrityError, match="ladder"):
        Ladder.restore({})


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, float("nan")])
def test_an_accuracy_is_a_share(accuracy):
    with pytest.raises(ValueError, match="accuracy"):
        Ladder().after(accuracy)


def test_accuracy_counts_fakes_scored_below_the_losses_boundary():
    assert accuracy_on_fakes(torch.tensor([[-1.0], [-0.1], [0.0], [2.0]])) == 0.5
    assert accuracy_on_fakes(torch.tensor([float("nan"), -1.0])) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        accuracy_on_fakes(torch.zeros(0))
