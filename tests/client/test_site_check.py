"""`consilium site check`: a hospital's own scans against a study; nothing is spent, stored or sent."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import nibabel
import numpy as np
import pytest
from small_site import (
    NOW,
    PURPOSE,
    QuickWork,
    approval,
    enrol_order,
    open_site,
    policy,
    settings,
    train_order,
)

from client.site_check import SiteCheck, check_site, count_patients
from common.cli import run
from common.errors import DataError
from common.settings.load import settings_yaml, study_digest
from common.settings.site import SitePolicy
from tests.provisioned import files
from tests.tiny_studies import tiny_study

STUDY = tiny_study(
    purpose=PURPOSE,
    privacy={
        "target_epsilon": 3.0,
        "delta": 1e-4,
        "sampling_probability": 0.25,
        "reference_patients": 20,
        "epsilon_cap": 40.0,
    },
    training={"rounds": 3, "critic_steps_per_round": 2, "fake_batch": 2},
    federation={"minimum_patients": 4},
)
SHAPE = (16, 16, 16)


def scan(folder: Path, patient: str, *, label_value: int = 1, spacing_mm: float = 1.0) -> None:
    rng = np.random.default_rng(sum(patient.encode()))
    label = np.zeros(SHAPE, np.uint8)
    label[6:10, 6:10, 6:10] = label_value
    image = (100 * rng.random(SHAPE) + 50 * label).astype(np.float32)
    for kind, voxels in (("images", image), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        volume = nibabel.Nifti1Image(voxels, np.diag([spacing_mm] * 3 + [1]))
        nibabel.save(volume, folder / kind / f"{patient}.nii.gz")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Ten good patients, one with a label that the study does not know, one with a broken image."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(10):
        scan(folder, f"p{number}")
    scan(folder, "strange", label_value=7)
    scan(folder, "broken")
    (folder / "images" / "broken.nii.gz").write_bytes(b"not a scan")
    return folder


@pytest.fixture
def site(tmp_path, scans) -> Path:
    return write_site(tmp_path / "site", data=scans)


def write_site(folder: Path, *, allowed: SitePolicy | None = None, **changes: object) -> Path:
    folder.mkdir()
    (folder / "site.yaml").write_text(settings_yaml(settings(folder, **{"simulation_seed": None, **changes})))
    (folder / "policy.yaml").write_text(settings_yaml(allowed or policy(studies=(), minimum_noise=0.5)))
    return folder


def study_file(folder: Path, study=STUDY) -> Path:
    path = folder / "study.yaml"
    path.write_text(settings_yaml(study))
    return path


def checked(site: Path, study=STUDY) -> SiteCheck:
    return check_site(site, study_file(site.parent, study), now=NOW)


def command(*arguments: object) -> int:
    point = EntryPoint("site check", "client.inspection_cli:check", "consilium.commands")
    return run(["site", "check", *map(str, arguments)], [point])


def test_every_scan_is_read_and_what_cannot_be_used_is_named(site, capsys):
    assert command(site, study_file(site.parent)) == 0
    shown = capsys.readouterr().out
    for words in (
        "used     10 scans of 10 patients",
        "labels/strange.nii.gz: ",
        "images/broken.nii.gz: ",
        "10 usable, at least 4 are needed",
        "about 6 of them to train on",
        "with this study",
        "the study is not approved",
        "the site could take part; nothing was spent",
    ):
        assert words in shown, shown


def test_json_counts_and_names_nobody(site, capsys):
    assert command(site, study_file(site.parent), "--json") == 0
    text = capsys.readouterr().out
    told = json.loads(text)
    assert told["ok"]
    assert (told["scans"]["used"], sum(told["scans"]["refused"].values())) == (10, 2)
    assert told["scans"]["spacing_mm"] == ["1 x 1 x 1"]
    assert [cost["allowed"] for cost in told["would_cost"]] == [True, True]
    assert "p1" not in text
    assert "strange" not in text


def test_nothing_of_the_site_is_touched(tmp_path, scans):
    folder = write_site(tmp_path / "site", data=scans)
    hospital = open_site(folder, QuickWork())
    hospital.handle(enrol_order())
    hospital.handle(train_order())
    before, data = files(folder), files(scans)
    found = checked(folder)
    assert found.ok
    assert found.costs[0].before > 0  # the ledger was read
    assert files(folder) == before
    assert files(scans) == data


def test_a_new_site_gets_neither_state_nor_ledger_from_a_check(site):
    before = files(site)
    assert checked(site).costs[0].before == 0
    assert files(site) == before
    assert not (site / "state").exists()


def test_a_step_is_timed_and_its_memory_estimated(site):
    step = checked(site).step
    assert 0 < step.seconds < 60
    assert step.round_s == pytest.approx(2 * step.seconds)
    assert (step.steps_per_round, step.rounds) == (2, 3)
    assert 0 < step.at_once <= step.drawn <= 10
    assert 0 < step.pass_mib < step.allowed_mib
    assert step.cohort_mib == pytest.approx(10 * 2 * 16**3 * 2 / 2**20)


def test_a_smaller_allowance_takes_fewer_patients_at_once(tmp_path, scans):
    wide = tiny_study(
        purpose=PURPOSE,
        privacy={**STUDY.model_dump()["privacy"], "sampling_probability": 1.0},
        training={"critic_width": 32, "views_per_patient": 20, "fake_batch": 2},
        federation={"minimum_patients": 4},
    )
    narrow = checked(write_site(tmp_path / "site", data=scans, training_memory_mib=64), wide).step
    assert narrow.at_once < narrow.drawn
    assert narrow.pass_mib <= 64


def test_too_few_patients_are_a_problem(site):
    found = checked(
        site, STUDY.model_copy(update={"federation": STUDY.federation.model_copy(update={"minimum_patients": 11})})
    )
    assert not found.ok
    assert any("10 usable patients are fewer than the 11" in problem for problem in found.problems)


def test_the_draw_of_the_held_out_is_foreseen():
    enough = count_patients(30, STUDY, policy(minimum_patients=10))
    assert enough.chance_of_too_few < 0.001
    scarce = count_patients(10, STUDY, policy(minimum_patients=8))
    assert scarce.chance_of_too_few == pytest.approx(0.738, abs=0.01)  # P(Bin(10, 0.65) <= 7)
    assert (scarce.least, scarce.least_members, scarce.expected_members) == (8, 8, 6.5)


def test_a_draw_that_may_leave_too_few_is_a_problem(tmp_path, scans):
    allowed = policy(studies=(), minimum_noise=0.5, minimum_patients=8)
    found = checked(write_site(tmp_path / "site", data=scans, allowed=allowed))
    assert any("with a chance of 74% fewer than the policy's 8" in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"epsilon_cap": 5.0}, "above the cap"),
        ({"maximum_rounds": 2}, "above `maximum_rounds`"),
        ({"minimum_noise": 90.0}, "below `minimum_noise`"),
    ],
)
def test_a_study_above_a_limit_is_a_problem_and_exit_code_1(tmp_path, scans, capsys, limits, words):
    allowed = policy(studies=(), **{"minimum_noise": 0.5, **limits})
    site = write_site(tmp_path / "site", data=scans, allowed=allowed)
    assert command(site, study_file(tmp_path), "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"]
    assert any(words in problem for problem in told["problems"])


def test_an_audit_that_needs_a_reference_set_asks_for_one(site):
    body = STUDY.model_dump()
    compared = type(STUDY).model_validate(
        {**body, "audit": {**body["audit"], "attacks": ["near_copy", "density_ratio"], "volumes": 100}}
    )
    assert any("`reference_set`" in problem for problem in checked(site, compared).problems)


def test_an_approved_study_is_said_to_be(tmp_path, scans):
    allowed = policy(studies=(approval(study_digest(STUDY)),), minimum_noise=0.5)
    found = checked(write_site(tmp_path / "site", data=scans, allowed=allowed))
    assert found.approved
    assert not any("not approved" in note for note in found.notes)


def test_scans_that_the_grid_cuts_off_are_a_note(site):
    body = STUDY.model_dump()
    small = type(STUDY).model_validate({**body, "grid": {"shape": (16, 16, 16), "spacing_mm": (0.2, 0.2, 0.2)}})
    assert any("cuts off" in note for note in checked(site, small).notes)


def test_no_usable_scan_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        checked(write_site(tmp_path / "site", data=tmp_path / "empty"))


def test_a_simulated_site_is_checked_on_its_phantoms(tmp_path):
    found = checked(write_site(tmp_path / "site", simulation_seed=1))
    assert found.report is None
    assert found.patients.count == 30
    assert len(found.notes) == 3


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_that_is_no_site_is_wrong_usage(tmp_path, capsys, name):
    assert command(tmp_path / name, tmp_path / "study.yaml") == 2
    assert "nothing was done" in capsys.readouterr().err


def test_a_study_that_cannot_be_read_is_wrong_usage(site, capsys):
    assert command(site, site / "gone.yaml") == 2
    (site.parent / "study.yaml").write_text(settings_yaml(STUDY).replace("rounds: 3", "rounds: 0"))
    assert command(site, site.parent / "study.yaml") == 2
    assert "training.rounds" in capsys.readouterr().err
