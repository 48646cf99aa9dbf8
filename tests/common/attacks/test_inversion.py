import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from common.attacks.inversion import Inversion, Inverter
from common.attacks.near_copy import NearCopy
from common.attacks.templates import pooled_draws
from common.errors import DataError, UsageError
from common.generator.network import PairGenerator
from tests.common.attacks.disguises import DISGUISES, disguised
from tests.common.attacks.memoriser import Memoriser, auc, phantoms

DRAWS, SEED = 400, 1
PEOPLE = torch.from_numpy(phantoms(124))
MEMBERS, STRANGERS, OTHERS, PUBLIC_A, PUBLIC_B = PEOPLE.split([8, 20, 8, 44, 44])


def memoriser(public: Tensor, remembered: Tensor) -> Memoriser:
    return Memoriser(public, remembered, latent_size=12, reach=0.8)


def inverter(generator: torch.nn.Module, steps: int) -> Inverter:
    return Inverter(generator, pooled_draws(generator, seed=SEED, first=0, count=DRAWS), seed=SEED, steps=steps)


def separation(attack: Inversion | NearCopy) -> float:
    return auc([attack.raw(x) for x in MEMBERS], [attack.raw(x) for x in STRANGERS[:14]])


@pytest.fixture(scope="module")
def public() -> Memoriser:
    return memoriser(PUBLIC_B, MEMBERS[:0])


@pytest.fixture(scope="module")
def reference(public: Memoriser) -> Inverter:
    return inverter(public, steps=10)


@pytest.fixture(scope="module")
def leaky() -> Memoriser:
    return memoriser(PUBLIC_A, MEMBERS)


@pytest.fixture(scope="module")
def attack(leaky: Memoriser, reference: Inverter) -> Inversion:
    return Inversion(inverter(leaky, steps=10), reference)


def test_patients_whom_sampling_does_not_show_are_found_in_the_weights(attack, leaky, public):
    sampled = NearCopy(*(pooled_draws(g, seed=SEED, first=0, count=DRAWS) for g in (leaky, public)))
    assert separation(sampled) < 0.6
    assert separation(attack) > 0.7


def test_a_generator_that_remembers_other_people_separates_nobody(reference):
    score = separation(Inversion(inverter(memoriser(PUBLIC_A, OTHERS), steps=10), reference))
    assert 0.2 < score < 0.8  # two standard deviations of an AUC of 8 against 14 are 0.26


def test_steps_down_the_gradient_bring_volumes_closer_to_every_scan(public, reference):
    start, searched = inverter(public, steps=0), reference
    before, after = ([i.residual(x) for x in STRANGERS[:6]] for i in (start, searched))
    assert all(b < a for a, b in zip(before, after, strict=True))
    assert np.mean(after) < 0.95 * np.mean(before)


def test_a_score_is_the_same_alone_after_others_and_in_inference_mode(attack):
    alone = attack.raw(STRANGERS[0])
    attack.raw(STRANGERS[1])
    with torch.inference_mode():
        inside = attack.raw(STRANGERS[:2].clone()[0])
    assert alone == attack.raw(STRANGERS[0]) == inside


def test_it_can_be_built_and_asked_where_everything_is_an_inference_tensor():
    network = PairGenerator(shape=(24, 16, 16), labels=2, latent_size=4, width=8)
    with torch.inference_mode():
        pooled = pooled_draws(network, seed=0, first=0, count=8)
        NearCopy(pooled, pooled).raw(torch.zeros(3, 24, 16, 16))  # the first use of this grid fills a cache
        built = Inverter(network, pooled, seed=0, steps=2)
        assert np.isfinite(built.residual(network(torch.zeros(1, 4))[0]))


def test_a_scan_of_another_grid_is_refused(attack):
    with pytest.raises(UsageError, match=r"\(3, 16, 16, 16\), the scan has \(3, 16, 16, 18\)"):
        attack.raw(torch.zeros(3, 16, 16, 18))


def test_searching_leaves_the_generator_as_it_was():
    network = PairGenerator(shape=(16, 16, 16), labels=2, latent_size=4, width=8)
    before = copy.deepcopy(network.state_dict())
    inverter(network, steps=2).residual(STRANGERS[0])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_the_scan_itself_as_own_copy_leaves_no_residual(attack, reference):
    assert attack.raw(STRANGERS[0], STRANGERS[0]) == pytest.approx(reference.residual(STRANGERS[0]), abs=1e-4)


@pytest.mark.parametrize("name", ["noise 0.02", "gain and offset", "flip"])
def test_a_disguised_own_copy_is_scored_above_every_stranger(attack, name):
    copies = torch.from_numpy(disguised(STRANGERS[:4].numpy(), name, seed=0))
    highest = max(attack.raw(x) for x in STRANGERS[4:12])
    assert min(attack.raw(x, c) for x, c in zip(STRANGERS[:4], copies, strict=True)) > highest


def test_swapping_candidate_and_reference_turns_the_score_around(leaky, attack, reference):
    backward = Inversion(reference, inverter(leaky, steps=10))
    assert backward.raw(MEMBERS[0]) == pytest.approx(-attack.raw(MEMBERS[0]), abs=1e-5)


def test_blank_scans_and_a_generator_of_one_flat_volume_have_finite_scores(attack, reference):
    flat = inverter(memoriser(torch.zeros_like(PUBLIC_A), MEMBERS[:0]), steps=3)
    assert np.isfinite(attack.raw(torch.zeros_like(STRANGERS[0])))
    assert np.isfinite(attack.raw(torch.full_like(STRANGERS[0], 1e6)))
    assert np.isfinite(Inversion(flat, reference).raw(STRANGERS[0]))


def test_what_cannot_be_inverted_is_refused_with_the_reason(reference):
    network = PairGenerator(shape=(16, 16, 16), labels=1, latent_size=4, width=8)
    pooled = pooled_draws(network, seed=0, first=0, count=8)
    with pytest.raises(UsageError, match="3 volumes"):
        Inverter(network, pooled[:3], seed=0)
    with pytest.raises(UsageError, match="-1 steps"):
        Inverter(network, pooled, seed=0, steps=-1)
    with pytest.raises(DataError, match="not finite"):
        Inverter(network, pooled * float("nan"), seed=0)
    with pytest.raises(UsageError, match="2 channels"):
        Inversion(Inverter(network, pooled, seed=0), reference)


@pytest.mark.slow
def test_a_network_overfitted_to_sixteen_patients_gives_them_away():
    torch.manual_seed(0)
    network = PairGenerator(shape=(16, 16, 16), labels=2, latent_size=8, width=16)
    fresh, members = copy.deepcopy(network), torch.cat([MEMBERS, OTHERS])
    codes = torch.randn(16, 8)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(400):
        optimiser.zero_grad()
        (network(codes) - members).square().mean().backward()
        optimiser.step()
    candidate, reference = inverter(network.eval(), steps=10), inverter(fresh.eval(), steps=10)
    assert separation(Inversion(candidate, reference)) > 0.95
    assert 0.2 < separation(Inversion(inverter(copy.deepcopy(fresh), steps=10), reference)) < 0.8


def test_the_disguises_are_pure_and_keep_shape_and_range():
    for name in DISGUISES:
        first, second = (disguised(STRANGERS[:3].numpy(), name, seed=3) for _ in range(2))
        assert first.tobytes() == second.tobytes()
        assert first.shape == (3, 3, 16, 16, 16)
        assert first.dtype == np.float32
        assert np.abs(first[:, 0]).max() <= 1
        assert not np.array_equal(first, STRANGERS[:3].numpy())
