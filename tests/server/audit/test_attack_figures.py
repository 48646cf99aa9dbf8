"""Figures show the numbers as they are: limits where they lie, the same bytes each time."""

import re
from dataclasses import replace

import pytest
from report_example import example_audit

from server.audit.attack_figures import _shares, bounds_figure, histogram_figure, roc_figure
from server.audit.result import AuditResult


@pytest.fixture(scope="module")
def audit() -> AuditResult:
    """One endpoint is enough, and drawing takes its time."""
    found = example_audit(0.0)
    return replace(found, endpoints=found.endpoints[:1])


def test_the_same_result_is_drawn_with_the_same_bytes(audit):
    assert roc_figure(audit, None).svg() == roc_figure(audit, None).svg()


def test_counts_are_drawn_as_shares_of_their_sum():
    assert _shares((3, 1, 6)) == [0.3, 0.1, 0.6]


def test_fitted_counts_are_not_said_to_reach_below_zero(audit):
    assert "fitted so that none is below zero" in histogram_figure(audit).description


def test_planted_copies_are_drawn_beside_members_and_held_out(audit):
    svg = histogram_figure(audit).svg()
    for label in ("members", "held out", "some copied on purpose"):
        assert label in svg


def test_the_proven_limit_is_drawn_only_where_something_is_proven(audit):
    assert "proven limit" not in roc_figure(audit, None).svg()
    drawn = roc_figure(audit, lambda rate: min(1.0, 7.4 * rate))
    assert "proven limit" in drawn.svg()
    assert "The proven limit there is 7.4 %" in drawn.description


def test_a_bound_beyond_its_limit_is_named_in_words():
    within = bounds_figure(example_audit(0.0)).description
    assert within == "Every AUC and rate bound drawn here lies within its limit."
    assert bounds_figure(example_audit(1.2)).description.startswith("Above its limit: ")


def test_both_axes_of_the_curve_are_logarithmic(audit):
    svg = roc_figure(audit, None).svg()
    assert len(re.findall(r">0\.1 %<", svg)) >= 2 * len(audit.endpoints)


def test_an_estimate_outside_of_what_a_rate_can_be_is_drawn_at_the_edge(audit):
    below = replace(audit.endpoints[0].tpr, low=-0.03, estimate=-0.01, high=0.02)
    assert "<path" in roc_figure(replace(audit, endpoints=(replace(audit.endpoints[0], tpr=below),)), None).svg()
