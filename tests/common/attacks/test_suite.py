import dataclasses
import math

import pytest
import torch

from common.attacks.suite import Material, build_suite, collapsed, fuse
from common.attacks.threads import one_thread_each
from common.errors import DataError, PolicyRefusal
from common.measure.audit_plan import Endpoint
from common.settings.study import AttackName
from tests.stored_pairs import Stored, noise_pairs
from tests.tiny_studies import tiny_audit_plan

PLAN = tiny_audit_plan()
CANDIDATES = noise_pairs(1, 80)


def material(pairs, generator=None) -> Material:
    volumes = torch.from_numpy(pairs)
    return Material(pooled=volumes[:-8], fresh=volumes[-8:], generator=generator, seed=3)


def suite(*attacks: AttackName, **more):
    plan = dataclasses.replace(PLAN, attacks=attacks)
    return build_suite(candidate=material(CANDIDATES), start=material(noise_pairs(2, 80)), plan=plan, **more)


def test_a_copy_is_above_every_fresh_candidate_in_every_endpoint():
    found = suite(AttackName.NEAR_COPY, AttackName.NEAREST)
    member, stranger = torch.from_numpy(CANDIDATES[0]), torch.from_numpy(noise_pairs(9, 1)[0])
    for endpoint in (Endpoint.FUSED, Endpoint.NEAR_COPY):
        assert found.scores(member)[endpoint] > 1 > found.scores(stranger)[endpoint]


def test_an_attack_that_sees_nothing_does_not_drown_the_one_that_does():
    assert fuse({AttackName.NEAR_COPY: 2.0, AttackName.NEAREST: -40.0}) == 0.5
    assert fuse({AttackName.NEAR_COPY: 300.0, AttackName.NEAREST: 0.0}) == 1.0


def test_a_score_that_is_not_a_number_makes_the_fused_score_none():
    assert math.isnan(fuse({AttackName.NEAR_COPY: math.nan, AttackName.NEAREST: 1.0}))


@pytest.mark.parametrize("name", [AttackName.DENSITY_RATIO, AttackName.SUBSTITUTE])
def test_an_attack_that_needs_people_to_compare_with_is_refused_without_them(name):
    with pytest.raises(PolicyRefusal, match="reference_set"):
        suite(AttackName.NEAR_COPY, name)


def test_with_consenting_people_all_sampling_attacks_enter_the_fused_score():
    consented = list(torch.from_numpy(noise_pairs(5, 70)))
    attacks = (AttackName.NEAR_COPY, AttackName.NEAREST, AttackName.DENSITY_RATIO, AttackName.SUBSTITUTE)
    found = suite(*attacks, consented=consented)
    assert set(found.units) == set(attacks)
    assert math.isfinite(found.scores(torch.from_numpy(noise_pairs(9, 1)[0]))[Endpoint.FUSED])


def test_inversion_without_a_generator_is_refused():
    with pytest.raises(DataError, match="no generator weights"):
        suite(AttackName.NEAR_COPY, AttackName.INVERSION)


def test_drawn_material_holds_different_volumes_for_scoring_and_for_the_unit():
    drawn = Material.drawn(Stored(noise_pairs(6, 500)), seed=1, count=4, fresh=3)
    assert drawn.pooled.shape == (4, 2, 16, 16, 16)
    assert drawn.fresh.shape == (3, 2, 16, 16, 16)
    assert all(not torch.equal(a, b) for a in drawn.pooled for b in drawn.fresh)


def noisy_repeats(kinds: int, noise: float) -> torch.Tensor:
    """(24, 2, 16, 16, 16): each volume is one of so many kinds, with noise of its own on the image."""
    volumes = torch.from_numpy(noise_pairs(31, kinds)).repeat(24 // kinds, 1, 1, 1, 1)
    volumes[:, 0] += noise * torch.randn(volumes[:, 0].shape, generator=torch.Generator().manual_seed(0))
    return volumes


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_one_volume_under_noise_has_collapsed_and_three_remembered_ones_have_not(noise):
    assert collapsed(noisy_repeats(1, noise))
    assert not collapsed(noisy_repeats(3, noise))


def test_nobody_has_a_score_against_a_generator_that_repeats_one_volume_with_noise():
    plan = dataclasses.replace(PLAN, attacks=(AttackName.NEAR_COPY, AttackName.NEAREST))
    repeats = noisy_repeats(1, 0.05)
    found = build_suite(
        candidate=Material(pooled=repeats[:-8], fresh=repeats[-8:]), start=material(noise_pairs(2, 80)), plan=plan
    )
    assert all(math.isnan(score) for score in found.scores(repeats[0]).values())


@pytest.fixture
def threads():
    """Torch's number of threads, to change; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_units_and_scores_do_not_depend_on_how_many_threads_a_hospital_has(threads):
    plan = dataclasses.replace(PLAN, attacks=(AttackName.NEAR_COPY, AttackName.NEAREST))
    candidate, start = material(noise_pairs(1, 80)), material(noise_pairs(2, 80))
    found = []
    for number in (1, 4):
        threads(number)
        built = build_suite(candidate=candidate, start=start, plan=plan)
        assert torch.get_num_threads() == number  # the caller's own again
        (scored,) = one_thread_each(built.scores, [candidate.pooled[0]])
        found.append((built.units, built.fused, scored))
    assert found[0] == found[1]


def test_the_callers_threads_come_back_when_scoring_is_given_up_or_fails(threads):
    threads(3)
    scoring = one_thread_each(lambda _: torch.get_num_threads(), range(5))
    assert next(scoring) == 1
    scoring.close()
    assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        list(one_thread_each(lambda n: 1 / n, [1, 0]))
    assert torch.get_num_threads() == 3
