import dataclasses
import math

import pytest

from common.measure.course import CheckpointRule, CoursePoint, choose, pareto_front
from common.measure.intervals import Interval


def point(
    utility: float, auc_high: float, epsilon: float | None = 4.0, round_: int = 0, confidence: float = 0.95
) -> CoursePoint:
    return CoursePoint(
        round=round_,
        epsilon_spent=epsilon,
        fidelity=None,
        utility=Interval(low=utility - 0.1, estimate=utility, high=utility + 0.1, confidence=0.95),
        generator_attack=Interval(low=auc_high - 0.2, estimate=auc_high - 0.1, high=auc_high, confidence=confidence),
        critic_attack=None,
        exact=False,
    )


RULE = CheckpointRule(max_auc=0.6, max_epsilon=8.0)


def test_the_most_useful_of_the_allowed_is_chosen():
    points = [point(0.5, 0.55, 2.0), point(0.7, 0.58, 4.0), point(0.9, 0.61, 6.0), point(0.95, 0.5, 8.1)]
    choice = choose(points, RULE)
    assert choice.index == 1
    assert "greatest of 2 allowed of 4" in choice.reason
    assert choice.confidence == pytest.approx(1 - 4 * 0.025)


def test_limits_themselves_are_allowed_and_the_bound_counts_rather_than_the_estimate():
    assert choose([point(0.5, 0.6, 8.0)], RULE).index == 0
    wide = point(0.5, 0.65)
    assert wide.generator_attack.estimate < RULE.max_auc
    assert choose([wide], RULE).index is None


def test_ties_go_to_the_smaller_auc_limit_then_epsilon_then_the_earlier_round():
    points = [point(0.7, 0.6), point(0.7, 0.55, 5.0, 3), point(0.7, 0.55, 4.0, 9), point(0.7, 0.55, 4.0, 2)]
    assert choose(points, RULE).index == 3
    assert choose(points[:3], RULE).index == 2
    assert choose(points[:2], RULE).index == 1


def test_nothing_allowed_is_no_choice_and_says_by_how_much():
    choice = choose([point(0.9, 0.7), point(0.9, 0.65), point(0.8, 0.5, 9.5)], RULE)
    assert choice.index is None
    assert choice.confidence is None
    assert "2 have an AUC limit above 0.6 (the lowest 0.650)" in choice.reason
    assert "1 spent more than epsilon 8 (the lowest 9.5)" in choice.reason
    assert "no checkpoint was measured" in choose([], RULE).reason


def test_training_without_privacy_exceeds_every_cap_and_passes_where_there_is_none():
    free = [point(0.9, 0.5, None)]
    assert "none is private" in choose(free, RULE).reason
    choice = choose(free, CheckpointRule(max_auc=0.6, max_epsilon=None))
    assert choice.index == 0
    assert "not private" in choice.reason


def test_a_laxer_rule_never_chooses_less_utility():
    points = [point(u / 10, 0.5 + ((7 * u) % 10) / 25, 1.0 + (3 * u) % 10, u) for u in range(10)]
    chosen = -math.inf
    for step in range(11):
        index = choose(points, CheckpointRule(max_auc=0.5 + 0.04 * step, max_epsilon=1.0 + step)).index
        now = -math.inf if index is None else points[index].utility.estimate
        assert now >= chosen
        chosen = now
    assert chosen == 0.9


def test_the_front_holds_what_nothing_else_beats_and_every_choice_lies_on_it():
    points = [
        point(0.5, 0.55, 2.0),
        point(0.5, 0.56, 2.0),  # leaks more than the first, gives nothing for it
        point(0.7, 0.6, 4.0),
        point(0.7, 0.6, 4.0),  # equal: stays
        point(0.4, 0.7, 1.0),  # cheapest
        point(0.7, 0.6, None),  # as good, without privacy
    ]
    assert pareto_front(points) == (0, 2, 3, 4)
    assert pareto_front([]) == ()
    for auc in (0.55, 0.6, 0.7):
        assert choose(points, CheckpointRule(max_auc=auc, max_epsilon=None)).index in pareto_front(points)


def test_values_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="max_auc"):
        CheckpointRule(max_auc=0.0, max_epsilon=None)
    with pytest.raises(ValueError, match="max_epsilon"):
        CheckpointRule(max_auc=0.6, max_epsilon=0.0)
    with pytest.raises(ValueError, match="round"):
        dataclasses.replace(point(0.5, 0.5), round=-1)
    with pytest.raises(ValueError, match="epsilon"):
        dataclasses.replace(point(0.5, 0.5), epsilon_spent=math.inf)
