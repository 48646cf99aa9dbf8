"""The warm-up release: one patient moves it by at most the clip norm, and its noise is what was paid for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.training.warm_up import clip_patient, clipped_sum, release
from common.measure.features import CLIP_NORM
from common.phantom.draw import public_phantoms
from common.privacy.mechanism import GaussianRelease
from common.protocol.messages import RELEASE_GRID
from tests.warmed_study import FEATURES, warmed_map, warmed_study

SCANS = public_phantoms(warmed_study(), 31, 6)[:, None]  # one scan each
STREAM = SecureStream.from_seed(0)


def cohort(members: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray] | None = None) -> Cohort:
    others = others or {"z": SCANS[5]}
    return Cohort.from_patients({**members, **others}, commit_split([*members], [*others], STREAM))


def members(count: int) -> dict[str, np.ndarray]:
    return {f"p{i}": SCANS[i] for i in range(count)}


@pytest.mark.parametrize(
    ("features", "clipped"),
    [
        ((0.3, 0.4), (0.3, 0.4)),
        ((30.0, 40.0), (0.6, 0.8)),
        ((np.nan, 0.1), (0, 0)),
        ((np.inf, 0), (0, 0)),
        ((0, 0), (0, 0)),
    ],
)
def test_short_vectors_stay_long_ones_are_bounded_and_broken_ones_are_silent(features, clipped) -> None:
    assert clip_patient(torch.tensor(features).double()).tolist() == pytest.approx(clipped)


@settings(max_examples=25, deadline=None)
@given(
    scan=arrays(
        np.float16,
        (2, 2, 1, 1, 1),
        elements=st.sampled_from([0.0, -1.0, 1.0, 65504.0, -65504.0, 6e-8, np.inf, -np.inf, np.nan]),
    )
)
def test_no_patient_whatever_the_scans_moves_the_sum_by_more_than_the_clip_norm(scan: np.ndarray) -> None:
    stranger = np.broadcast_to(scan, (2, 2, 16, 16, 16)).copy()
    without = clipped_sum(warmed_map(), cohort(members(2)))
    added = clipped_sum(warmed_map(), cohort({**members(2), "stranger": stranger})) - without
    assert bool(added.isfinite().all())
    assert float(added.norm()) <= CLIP_NORM * (1 + 1e-12)


def test_every_patient_moves_the_sum_by_at_most_the_clip_norm_and_some_by_nearly_that_much() -> None:
    everyone = clipped_sum(warmed_map(), cohort(members(5)))
    moved = []
    for gone in members(5):
        rest = {name: scans for name, scans in members(5).items() if name != gone}
        moved.append(float((everyone - clipped_sum(warmed_map(), cohort(rest))).norm()))
    assert max(moved) <= CLIP_NORM * (1 + 1e-12)
    assert max(moved) > 0.9 * CLIP_NORM  # or the noise would be larger than it need be


def test_a_patient_with_many_scans_weighs_no_more_than_one_with_one() -> None:
    many = {"p0": np.repeat(SCANS[0], 7, axis=0)}
    assert torch.allclose(
        clipped_sum(warmed_map(), cohort(many)), clipped_sum(warmed_map(), cohort(members(1))), atol=1e-6
    )
    both = clipped_sum(warmed_map(), cohort({"p0": np.concatenate([SCANS[0], SCANS[1]])}))
    assert float(both.norm()) <= CLIP_NORM * (1 + 1e-12)


def test_a_patient_that_cannot_be_measured_counts_as_nobody() -> None:
    broken = {"broken": np.full_like(SCANS[0], np.nan)}
    assert torch.equal(
        clipped_sum(warmed_map(), cohort({**members(2), **broken})), clipped_sum(warmed_map(), cohort(members(2)))
    )


def test_patients_held_out_change_nothing() -> None:
    mechanism = GaussianRelease(noise_multiplier=1.0)
    answers = [
        release(warmed_map(), mechanism, cohort=cohort(members(2), others), stream=STREAM.fork("same"))
        for others in ({"z": SCANS[5]}, {"y": SCANS[4] * 0, "z": SCANS[3]})
    ]
    assert answers[0] == answers[1]


def deviation(noise_multiplier: float, releases: int = 60) -> float:
    """Root mean square of what the release adds to the sum, over all features of some releases."""
    everyone = cohort(members(1))
    exact = clipped_sum(warmed_map(), everyone).numpy()
    mechanism = GaussianRelease(noise_multiplier=noise_multiplier)
    added = [
        np.array(release(warmed_map(), mechanism, cohort=everyone, stream=STREAM.fork("noise", i))) - exact
        for i in range(releases)
    ]
    return float(np.sqrt(np.mean(np.square(added))))


def test_noise_has_the_deviation_that_the_plan_states_neither_two_thirds_nor_three_halves_of_it() -> None:
    found = deviation(1.5)  # 60 * 44 normals: a standard error of 1.4 %
    assert found == pytest.approx(1.5 * CLIP_NORM, rel=0.06)
    assert found != pytest.approx(2 / 3 * 1.5 * CLIP_NORM, rel=0.06)
    assert found != pytest.approx(3 / 2 * 1.5 * CLIP_NORM, rel=0.06)


def test_every_coordinate_has_noise_of_its_own() -> None:
    everyone = cohort(members(1))
    exact = clipped_sum(warmed_map(), everyone).numpy()
    added = np.array(
        release(warmed_map(), GaussianRelease(noise_multiplier=1.0), cohort=everyone, stream=STREAM.fork("own"))
    )
    assert len({round(float(value), 3) for value in added - exact}) > 0.9 * FEATURES


def test_release_without_members_is_noise_like_any_other() -> None:
    nobody = cohort({})
    sums = release(warmed_map(), GaussianRelease(noise_multiplier=1.0), cohort=nobody, stream=STREAM.fork("nobody"))
    assert len(sums) == FEATURES
    assert 0.5 < float(np.std(sums)) < 1.5


@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0, 30.0])
def test_every_sum_is_a_multiple_of_the_public_grid(noise: float) -> None:
    sums = release(
        warmed_map(), GaussianRelease(noise_multiplier=noise), cohort=cohort(members(2)), stream=STREAM.fork("grid")
    )
    assert all((value / RELEASE_GRID).is_integer() for value in sums)
    assert all(type(value) is float for value in sums)


def test_release_without_noise_is_the_sum_itself() -> None:
    sums = release(
        warmed_map(), GaussianRelease(noise_multiplier=0.0), cohort=cohort(members(3)), stream=STREAM.fork("none")
    )
    assert np.allclose(sums, clipped_sum(warmed_map(), cohort(members(3))).numpy(), atol=RELEASE_GRID)
