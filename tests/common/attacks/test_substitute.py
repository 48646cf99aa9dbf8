import numpy as np
import pytest
import torch

from common.attacks.substitute import Substitute, _Logistic
from common.attacks.templates import pool
from common.errors import DataError
from tests.common.attacks.disguises import disguised
from tests.common.attacks.memoriser import auc, phantoms

PEOPLE = torch.from_numpy(phantoms(200))
MEMBERS, STRANGERS, INDEPENDENT, REFERENCE = PEOPLE.split([20, 20, 80, 80])


def test_many_copies_pull_members_to_the_synthetic_side():
    copies = [torch.from_numpy(disguised(MEMBERS.numpy(), "noise 0.10", seed=s)) for s in range(8)]
    score = Substitute(pool(torch.cat([INDEPENDENT, *copies])), pool(REFERENCE))
    assert auc([score.raw(x) for x in MEMBERS], [score.raw(x) for x in STRANGERS]) > 0.7


def test_synthetic_volumes_of_strangers_separate_nobody():
    score = Substitute(pool(INDEPENDENT), pool(REFERENCE))
    assert 0.3 < auc([score.raw(x) for x in MEMBERS], [score.raw(x) for x in STRANGERS]) < 0.7


def test_a_reference_volume_is_scored_by_the_regression_that_did_not_see_it():
    score = Substitute(pool(INDEPENDENT), pool(REFERENCE))
    moved = REFERENCE.clone()
    moved[7] = STRANGERS[0]  # another person at number 7 changes every fold's regression but the one leaving 7 out
    other = Substitute(pool(INDEPENDENT), pool(moved))
    assert other.reference_raw(7, REFERENCE[7]) == score.reference_raw(7, REFERENCE[7])
    assert other.reference_raw(8, REFERENCE[7]) != score.reference_raw(8, REFERENCE[7])


def test_an_own_copy_pulls_as_one_more_fitted_volume_would():
    rng = torch.Generator().manual_seed(0)
    inside = torch.randn(400, 6, generator=rng, dtype=torch.float64) + 0.3
    outside, added = (torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (400, 5))
    model = _Logistic.fit(inside, outside)
    for copy in added:
        refitted = _Logistic.fit(torch.cat([inside, copy[None]]), outside)
        true = refitted.logits(copy[None], None) - model.logits(copy[None], None)
        assert float(model.logits(copy[None], copy) - model.logits(copy[None], None)) == pytest.approx(
            float(true), rel=0.25, abs=2e-3
        )


@pytest.mark.parametrize("seed", [1, 2])
def test_the_fit_is_at_the_minimum_also_where_whole_newton_steps_run_away(seed):
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(120, 8, generator=rng, dtype=torch.float64)
    z = z * torch.exp(3 * torch.randn(120, 1, generator=rng, dtype=torch.float64))  # few volumes, far outside
    terms = torch.cat([z, z**2 - 1, torch.ones(120, 1, dtype=torch.float64)], dim=1)
    beta = _Logistic.fit(terms[:60], terms[60:]).coefficients.requires_grad_()
    softplus = torch.nn.functional.softplus
    loss = softplus(-terms[:60] @ beta).sum() + softplus(terms[60:] @ beta).sum() + beta @ beta / 20
    (gradient,) = torch.autograd.grad(loss, beta)
    assert gradient.abs().max() < 1e-2  # 1e6 where they ran away


def test_volumes_all_alike_and_blank_scans_have_finite_scores():
    for synthetic in (pool(INDEPENDENT[:1]).expand(100, -1, -1, -1, -1), torch.zeros(100, 3, 16, 16, 16)):
        score = Substitute(synthetic, pool(REFERENCE))
        for scan in (STRANGERS[0], torch.zeros(3, 16, 16, 16), torch.full((3, 16, 16, 16), 1e6)):
            assert np.isfinite(score.raw(scan))


def test_too_small_a_reference_set_is_refused():
    with pytest.raises(DataError, match="reference set has 20"):
        Substitute(pool(INDEPENDENT), pool(REFERENCE[:20]))
