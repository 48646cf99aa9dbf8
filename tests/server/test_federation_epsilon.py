import pytest

from common.privacy.accounting import epsilon
from common.privacy.mechanism import DpSgd, GaussianRelease, NoisedCounts
from server.federation_epsilon import federation_epsilon, federation_text

ROUND = DpSgd(noise_multiplier=4.0, sampling_probability=0.5, steps=20)
SITES = {
    "north": [GaussianRelease(noise_multiplier=5.0), ROUND, ROUND, NoisedCounts(epsilon=0.5)],
    "south": [ROUND],
    "west": [ROUND, ROUND, ROUND],
}


def test_each_patient_pays_for_their_own_site_alone():
    found = federation_epsilon(SITES, 1e-3)
    for site, mechanisms in SITES.items():
        assert found.sites[site] == epsilon(mechanisms, 1e-3)
    assert found.worst == max(found.sites.values(), key=lambda spent: spent.upper)
    alone = federation_epsilon({"north": SITES["north"]}, 1e-3)
    assert found.sites["north"] == alone.sites["north"]  # other sites change nothing


def test_a_patient_of_two_sites_pays_for_the_two_costliest():
    found = federation_epsilon(SITES, 1e-3)
    assert found.two_sites == epsilon([*SITES["north"], *SITES["west"]], 1e-3)
    assert found.worst.upper < found.two_sites.upper < found.everywhere.upper
    assert found.everywhere == epsilon([m for done in SITES.values() for m in done], 1e-3)


def test_the_statement_says_whose_epsilon_it_is_and_gives_every_bound():
    found = federation_epsilon(SITES, 1e-3)
    text = federation_text(found)
    assert text.startswith("Each patient: the epsilon of their own site (north: ")
    for bound in (*found.sites.values(), found.two_sites, found.everywhere):
        assert f"{bound.upper:.2f}" in text
    assert "known at two sites adds up" in text
    assert "delta 0.001" in text
    assert "two sites" not in federation_text(federation_epsilon({"only": [ROUND]}, 1e-3))


def test_a_federation_without_sites_has_no_epsilon():
    with pytest.raises(ValueError, match="at least one site"):
        federation_epsilon({}, 1e-3)
