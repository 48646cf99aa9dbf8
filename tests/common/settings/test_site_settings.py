from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.errors import SettingsError
from common.settings.load import settings_yaml
from common.settings.site import Approval, OrderKind, PhantomSource, SitePolicy, SiteSettings, load_policy, load_site
from common.settings.study import PhantomKind

LEAST = {
    "epsilon_cap": 8.0,
    "delta_cap": 1e-3,
    "minimum_noise": 0.5,
    "maximum_rounds": 40,
    "maximum_steps": 1000,
    "minimum_patients": 20,
    "expires": date(2027, 1, 31),
}

APPROVAL = Approval(
    digest="0" * 64,
    study="vessels",
    coordinator_key="1" * 64,
    approved_by="Dr. Test",
    approved_on=date(2026, 11, 1),
)


def saved(folder, text, name="site.yaml"):
    (folder / name).write_text(text)
    return folder / name


def test_paths_are_taken_from_the_folder_of_the_file(tmp_path):
    site = load_site(saved(tmp_path, "site: north\ndata: ../scans\nstate: state\npart: [0, 3]\n"))
    assert site.data == tmp_path / "../scans"
    assert site.state == tmp_path / "state"
    assert site.part == (0, 3)
    assert not site.simulated


def test_an_absolute_path_stays(tmp_path):
    assert load_site(saved(tmp_path, "site: north\ndata: /scans\nstate: /state\n")).data == Path("/scans")


def test_phantoms_stand_in_for_a_folder_and_survive_yaml(tmp_path):
    phantoms = PhantomSource(kind=PhantomKind.VESSELS, patients=300, seed=1, site=2)
    settings = SiteSettings(site="site-2", data=phantoms, state=Path("/state"), simulation_seed=7)
    assert load_site(saved(tmp_path, settings_yaml(settings))) == settings
    assert settings.simulated


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("site: north\ndata: d\nstate: s\npart: [3, 3]\n", "index 3 must lie in 0..2"),
        ("site: north\ndata: {kind: vessels, patients: 9, seed: 1, site: 0}\nstate: s\npart: [0, 2]\n", "per site"),
        ("site: North Hospital\ndata: d\nstate: s\n", "site.yaml: site: "),
        ("site: north\ndata: d\nstate: s\ndevise: cpu\n", "did you mean 'device'?"),
        ("site: north\ndata: {kind: vessels, patient: 9, seed: 1, site: 0}\nstate: s\n", "did you mean 'patients'?"),
    ],
)
def test_a_wrong_site_file_is_told_what_is_wrong(tmp_path, text, part):
    with pytest.raises(SettingsError) as told:
        load_site(saved(tmp_path, text))
    assert part in str(told.value)


def test_a_policy_allows_nothing_that_it_does_not_name():
    policy = SitePolicy(**LEAST)
    assert (policy.studies, policy.purposes, policy.orders) == ((), (), ())
    assert (policy.code_digests, policy.app_digests) == ((), ())
    assert not policy.research_answers
    assert not policy.simulation


def test_a_policy_survives_yaml_and_its_digest_covers_every_bound(tmp_path):
    policy = SitePolicy(**LEAST, studies=(APPROVAL,), purposes=("research",), orders=(OrderKind.TRAIN,))
    path = saved(tmp_path, settings_yaml(policy), "policy.yaml")
    assert load_policy(path) == policy
    digests = {policy.digest} | {
        policy.model_copy(update=change).digest
        for change in ({"epsilon_cap": 9.0}, {"orders": ()}, {"expires": date(2027, 2, 1)}, {"minimum_noise": 0.4})
    }
    assert len(digests) == 5


def test_a_policy_without_a_bound_is_refused_and_so_is_an_endless_one(tmp_path):
    path = saved(tmp_path, "epsilon_cap: .inf\ndelta_cap: 1e-3\n", "policy.yaml")
    with pytest.raises(SettingsError) as told:
        load_policy(path)
    assert "policy.yaml: epsilon_cap: input should be a finite number" in str(told.value)
    assert "policy.yaml: key 'expires' is missing" in str(told.value)


def test_a_study_is_approved_once_and_for_one_coordinator():
    other = APPROVAL.model_copy(update={"coordinator_key": "2" * 64})
    with pytest.raises(ValidationError, match="each digest is approved once, for one coordinator"):
        SitePolicy(**LEAST, studies=(APPROVAL, other))


def test_exact_answers_are_for_simulation_only():
    with pytest.raises(ValidationError, match="only a simulation may set it"):
        SitePolicy(**LEAST, research_answers=True)
    assert SitePolicy(**LEAST, research_answers=True, simulation=True).research_answers


@pytest.mark.parametrize(("data", "reference"), [("scans", "scans"), ("scans", "scans/public"), ("all/scans", "all")])
def test_a_reference_set_that_overlaps_the_patients_is_refused(tmp_path, data, reference):
    text = f"site: north\ndata: {data}\nreference_set: {reference}\nstate: state\n"
    with pytest.raises(SettingsError, match="reference_set"):
        load_site(saved(tmp_path, text))


def test_a_reference_set_beside_the_patients_is_taken_from_the_folder_of_the_file(tmp_path):
    site = load_site(saved(tmp_path, "site: north\ndata: scans\nreference_set: public\nstate: state\n"))
    assert site.reference_set == tmp_path / "public"
