"""The simulated hospitals' disks: where their patients come from and what their policies allow."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from common.errors import UsageError
from common.installed import code_digest
from common.settings.load import study_digest
from common.settings.site import OrderKind, PartBy, PhantomSource, load_policy, load_site
from common.volume.nifti import write_nifti
from common.volume.volume import Volume
from server.run_folder import Engine, RunFacts, RunFolder
from server.seeds import derive
from server.simulated_sites import Cohorts, check_sites, plan_sites, write_sites
from tests.tiny_studies import tiny_plan, tiny_study

STUDY = tiny_study(purpose="tests of simulated hospitals", federation={"quorum": 2, "minimum_patients": 4})
PLAN = tiny_plan(STUDY, noise=0.9)
NOW = datetime(2027, 1, 1, tzinfo=UTC)
KEY = "a" * 64
PHANTOMS = Cohorts(folder=None, sites=None, phantoms=30)


def scans(folder: Path, patients: int) -> Path:
    """File names as in a Decathlon task; nothing is read from them here."""
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
        for i in range(patients):
            (folder / kind / f"case_{i:03d}.nii.gz").touch()
    return folder


def run_with(folder: Path, cohorts: Cohorts) -> RunFolder:
    settings = plan_sites(STUDY, cohorts, 0)
    facts = RunFacts(
        engine=Engine.LOCAL,
        sites=tuple(site.site for site in settings),
        seed=0,
        simulated=True,
        study_digest=study_digest(STUDY),
    )
    run = RunFolder.create_or_resume(folder, STUDY, facts)
    check_sites(run, settings)
    write_sites(run, settings, STUDY, PLAN, coordinator_key=KEY, now=NOW)
    return run


def test_three_hospitals_draw_different_patients_on_different_scanners():
    sources = [site.data for site in plan_sites(STUDY, PHANTOMS, 0)]
    assert all(isinstance(source, PhantomSource) for source in sources)
    assert [source.site for source in sources if isinstance(source, PhantomSource)] == [1, 2, 3]


def test_hospitals_never_draw_from_the_seed_of_the_public_warm_start():
    seeds = {site.data.seed for site in plan_sites(STUDY, PHANTOMS, 0) if isinstance(site.data, PhantomSource)}
    assert not seeds & {0, derive(0, "warm start"), derive(0, "candidates")}


def test_every_hospital_has_its_own_randomness():
    seeds = {site.simulation_seed for site in plan_sites(STUDY, PHANTOMS, 0)}
    assert len(seeds) == 3
    assert None not in seeds


def test_one_folder_is_shared_out_by_patient(tmp_path: Path):
    settings = plan_sites(STUDY, Cohorts(folder=scans(tmp_path / "scans", 30), sites=2, phantoms=1), 0)
    assert [(site.data, site.part) for site in settings] == [
        (tmp_path / "scans", (0, 2)),
        (tmp_path / "scans", (1, 2)),
    ]


def pet(folder: Path, sizes_mm: list[float]) -> Path:
    """A patient of PET for each voxel size across the body."""
    for i, mm in enumerate(sizes_mm):
        (folder / f"p{i:02d}").mkdir(parents=True)
        for name in ("image", "mask"):
            volume = Volume(voxels=np.zeros((2, 2, 2), np.uint8), affine=np.diag([mm, mm, 3.0, 1.0]))
            write_nifti(folder / f"p{i:02d}" / f"PET_{name}.nii.gz", volume)
    return folder


def parts(folder: Path, sites: int | None, split: PartBy | None) -> list[tuple[object, PartBy]]:
    cohorts = Cohorts(folder=folder, sites=sites, phantoms=1, split=split)
    return [(site.part, site.part_by) for site in plan_sites(STUDY, cohorts, 0)]


BY_SIZE = [((0, 3), PartBy.SPACING), ((1, 3), PartBy.SPACING), ((2, 3), PartBy.SPACING)]


def test_pet_of_as_many_voxel_sizes_as_sites_is_shared_out_by_size_unless_told_otherwise(tmp_path: Path) -> None:
    folder = pet(tmp_path, [3.9, 4.7, 5.5] * 8)
    assert parts(folder, None, None) == parts(folder, 3, None) == parts(folder, None, PartBy.SPACING) == BY_SIZE
    assert parts(folder, 2, None) == [((0, 2), PartBy.PATIENT), ((1, 2), PartBy.PATIENT)]
    assert {by for _, by in parts(folder, 3, PartBy.PATIENT)} == {PartBy.PATIENT}


def test_voxel_sizes_that_are_not_as_many_as_sites_are_refused_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"scans of 2 voxel sizes, --sites asks for 3; .* Give --sites 2"):
        parts(pet(tmp_path, [3.9, 5.5] * 8), 3, PartBy.SPACING)


def test_a_voxel_size_of_too_few_patients_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"voxel size 3 of 3 .* 2 patients, .* or --split patient"):
        parts(pet(tmp_path, [3.9, 4.7] * 8 + [5.5] * 2), 3, None)


def test_a_split_without_one_folder_to_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data names none"):
        plan_sites(STUDY, Cohorts(folder=None, sites=3, phantoms=30, split=PartBy.SPACING), 0)
    scans(tmp_path / "site-1", 10)
    with pytest.raises(UsageError, match="has a folder for each site"):
        parts(tmp_path, None, PartBy.PATIENT)


def test_folders_of_hospitals_are_taken_as_they_are(tmp_path: Path):
    for number in (1, 2, 3, 4):
        scans(tmp_path / f"site-{number}", 10)
    settings = plan_sites(STUDY, Cohorts(folder=tmp_path, sites=None, phantoms=1), 0)
    assert [(site.data, site.part) for site in settings] == [(tmp_path / f"site-{n}", None) for n in (1, 2, 3, 4)]


def test_a_number_of_sites_that_contradicts_the_folders_is_refused(tmp_path: Path):
    for number in (1, 2):
        scans(tmp_path / f"site-{number}", 10)
    with pytest.raises(UsageError, match="folders for 2 sites, --sites asks for 3"):
        plan_sites(STUDY, Cohorts(folder=tmp_path, sites=3, phantoms=1), 0)


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="is not a folder"):
        plan_sites(STUDY, Cohorts(folder=tmp_path / "nowhere", sites=None, phantoms=1), 0)


def test_a_folder_without_scans_is_refused(tmp_path: Path):
    with pytest.raises(UsageError):
        plan_sites(STUDY, Cohorts(folder=tmp_path, sites=None, phantoms=1), 0)


def test_a_hospital_folder_without_a_usable_pair_is_refused(tmp_path: Path):
    scans(tmp_path / "site-1", 10)
    scans(tmp_path / "site-2", 0)
    with pytest.raises(UsageError, match="no usable pair"):
        plan_sites(STUDY, Cohorts(folder=tmp_path, sites=None, phantoms=1), 0)


def test_fewer_patients_than_the_study_needs_are_refused_with_the_numbers(tmp_path: Path):
    with pytest.raises(UsageError, match=r"12 patients shared by 3 sites, 35% .* leave about 3 .* the study needs 4"):
        plan_sites(STUDY, Cohorts(folder=scans(tmp_path, 12), sites=3, phantoms=1), 0)


def test_fewer_sites_than_the_quorum_are_refused():
    with pytest.raises(UsageError, match="1 sites are fewer than the study's quorum of 2"):
        plan_sites(STUDY, Cohorts(folder=None, sites=1, phantoms=30), 0)


def test_a_hospital_allows_this_study_under_this_plan_and_nothing_else(tmp_path: Path):
    run = run_with(tmp_path / "run", PHANTOMS)
    policy = load_policy(run.sites / "site-2" / "policy.yaml")
    assert [(a.digest, a.study, a.coordinator_key) for a in policy.studies] == [(study_digest(STUDY), "tiny", KEY)]
    assert policy.code_digests == (code_digest(),)
    assert policy.purposes == (STUDY.purpose,)
    assert (policy.minimum_noise, policy.maximum_rounds, policy.maximum_steps, policy.epsilon_cap) == (0.9, 3, 15, 20.0)
    assert set(policy.orders) == set(OrderKind)
    assert policy.simulation
    assert policy.research_answers  # for the comparison after signing; the policy's own rule ties it to simulation


def test_a_site_file_reads_back_with_its_folder(tmp_path: Path):
    run = run_with(tmp_path / "run", PHANTOMS)
    site = load_site(run.sites / "site-3" / "site.yaml")
    assert (site.site, site.state) == ("site-3", run.sites / "site-3" / "state")


def test_a_resumed_run_keeps_its_policies_to_the_letter(tmp_path: Path):
    run = run_with(tmp_path / "run", PHANTOMS)
    policy = run.sites / "site-1" / "policy.yaml"
    policy.write_text(policy.read_text() + "# tightened by the hospital\n")
    run_with(tmp_path / "run", PHANTOMS)
    assert "tightened" in policy.read_text()


def test_a_resumed_run_with_other_patients_is_refused(tmp_path: Path):
    run_with(tmp_path / "run", PHANTOMS)
    with pytest.raises(UsageError, match=r"site-1 of the run in .* has other patients"):
        run_with(tmp_path / "run", Cohorts(folder=None, sites=None, phantoms=31))
