import dataclasses
import hashlib
import json
import os
from importlib.metadata import EntryPoint
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from common.attacks.near_copy import NearCopy
from common.attacks.nearest import Nearest
from common.attacks.templates import pool
from common.cli import run
from common.errors import DataError, UsageError
from common.generator.network import PairGenerator, build_generator, save_weights, weights_of
from common.measure.audit_plan import AuditPlan, Endpoint, Group
from common.settings.load import study_json
from common.settings.study import AttackName, Question
from common.telemetry.events import ignore
from common.volume.nifti import write_nifti
from common.volume.volume import Grid, Volume
from server.audit.folder_audit import FolderAudit, WhiteBox, audit_folders, folder_plan
from server.audit.folders import Folders, Scan, ScanFolder, Unread, read_folders
from server.audit.result import AuditResult, Verdict
from tests.common.attacks.disguises import disguised
from tests.common.attacks.memoriser import Memoriser, phantoms
from tests.tiny_studies import tiny_study

DATA = Path(os.environ.get("CONSILIUM_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
HIPPOCAMPUS = DATA / "segmentation" / "msd_task04_hippocampus"
SIDE = 16


def people(seed: int, n: int) -> np.ndarray:
    """(n, 1, 16, 16, 16) float16: everybody's anatomy is common, the fine structure is their own."""
    rng = np.random.default_rng(seed)
    common = np.linspace(-0.5, 0.5, SIDE)[:, None, None] * np.ones((SIDE,) * 3)
    coarse = torch.from_numpy(rng.normal(size=(n, 1, 7, 7, 7)).astype(np.float32))
    own = torch.nn.functional.interpolate(coarse, size=(SIDE,) * 3, mode="trilinear", align_corners=True).numpy()
    return np.clip(common + 0.35 * own, -1, 1).astype(np.float16)


def scan(name: str, pair: np.ndarray, patient: str | None = None) -> Scan:
    prints = frozenset({hashlib.sha256(pair.tobytes()).digest()})
    return Scan(patient=patient or name, name=f"{name}.nii.gz", pair=pair, prints=prints)


def folder(prefix: str, pairs: np.ndarray, extent_mm: float = 32.0) -> ScanFolder:
    scans = tuple(scan(f"{prefix}{i:04d}", pair) for i, pair in enumerate(pairs))
    return ScanFolder(scans=scans, unread=(), extent_mm=(extent_mm,) * 3)


def folders(members: np.ndarray, nonmembers: np.ndarray, synthetic: np.ndarray) -> Folders:
    return Folders(
        members=folder("m", members),
        nonmembers=folder("n", nonmembers),
        synthetic=folder("s", synthetic),
        reference=None,
        grid=Grid(shape=(SIDE,) * 3, spacing_mm=(2.0,) * 3),
        labels={},
    )


def audit(given: Folders) -> FolderAudit:
    return audit_folders(given, study=None, white_box=None, observer=ignore)


def reasons(found: FolderAudit) -> str:
    return "\n".join(found.result.reasons)


def with_synthetic(given: Folders, scans: tuple[Scan, ...]) -> Folders:
    return dataclasses.replace(given, synthetic=dataclasses.replace(given.synthetic, scans=scans))


LEAKLESS = folders(people(1, 30), people(2, 30), people(3, 24))
SMALL = folders(people(1, 20), people(2, 20), people(3, 16))


# What is found


def test_a_generator_that_repeats_its_members_in_disguise_fails_and_the_pairs_are_listed():
    members = people(4, 30)
    copies = np.concatenate([disguised(members[:20].astype(np.float32), "shift", 1), people(5, 10)])
    found = audit(folders(members, people(6, 30), copies.astype(np.float16)))
    assert found.result.verdict is Verdict.FAIL
    named = {(pair.synthetic, pair.member) for pair in found.near_copies.pairs}
    assert {(f"s{i:04d}.nii.gz", f"m{i:04d}.nii.gz") for i in range(20)} <= named
    assert 20 <= found.near_copies.members_beyond < 25
    assert found.near_copies.held_out < min(pair.similarity for pair in found.near_copies.pairs[:20])


def test_one_members_very_voxels_are_a_leak_whatever_the_statistics_say():
    synthetic = np.concatenate([people(3, 24), LEAKLESS.members.scans[7].pair[None]])
    found = audit(folders(people(1, 30), people(2, 30), synthetic))
    assert found.result.verdict is Verdict.FAIL
    assert found.result.reasons[0] == "1 synthetic volumes are members' scans, voxel by voxel"
    first = found.near_copies.pairs[0]
    assert (first.synthetic, first.member, first.identical) == ("s0024.nii.gz", "m0007.nii.gz", True)


@pytest.mark.parametrize("n", [5, 20])
def test_a_small_cohort_never_passes_although_nothing_leaks(n):
    found = audit(folders(people(1, n), people(2, n), people(3, 24)))
    assert found.result.verdict is Verdict.INCONCLUSIVE
    assert ("with fewer than 20 there is no verdict" in reasons(found)) == (n < 20)
    if n >= 20:
        assert "would not be seen" in reasons(found)


def test_one_volume_again_and_again_is_no_measurement():
    found = audit(folders(people(1, 20), people(2, 20), np.repeat(people(3, 1), 16, axis=0)))
    assert found.result.verdict is Verdict.INCONCLUSIVE
    assert "scores are all alike" in reasons(found)


def test_a_non_member_that_is_a_member_too_spoils_the_control():
    nonmembers = people(2, 20)
    nonmembers[3] = people(1, 20)[11]
    found = audit(folders(people(1, 20), nonmembers, people(3, 16)))
    assert found.result.verdict is Verdict.INCONCLUSIVE
    assert "1 scans of non-members are members' scans too (n0003.nii.gz is m0011.nii.gz)" in reasons(found)


def test_the_same_scan_saved_with_other_grey_values_is_still_the_same_scan():
    nonmembers = people(2, 20)
    nonmembers[3] = disguised(people(1, 20)[11:13].astype(np.float32), "noise 0.02", 1)[0]
    found = audit(folders(people(1, 20), nonmembers, people(3, 16)))
    assert "n0003.nii.gz is m0011.nii.gz" in reasons(found)


def test_a_non_members_very_voxels_among_the_synthetic_volumes_say_that_nobody_was_held_out():
    found = audit(folders(people(1, 20), people(2, 20), np.concatenate([people(3, 16), people(2, 2)])))
    assert found.result.verdict is Verdict.INCONCLUSIVE
    assert "these patients were not held out" in reasons(found)


def test_a_synthetic_volume_that_could_not_be_read_keeps_a_pass_away_but_not_a_leak():
    torn = (Unread(name="s9999.nii.gz", reason="values that are not finite"),)
    given = dataclasses.replace(SMALL, synthetic=dataclasses.replace(SMALL.synthetic, unread=torn))
    assert "s9999.nii.gz: values that are not finite" in reasons(audit(given))
    copies = folder("c", disguised(people(1, 20).astype(np.float32), "shift", 1).astype(np.float16)).scans
    leaking = audit(with_synthetic(given, (*given.synthetic.scans, *copies)))
    assert leaking.result.verdict is Verdict.FAIL
    assert "s9999.nii.gz" in reasons(leaking)


def test_volumes_of_another_extent_are_told():
    given = dataclasses.replace(SMALL, members=folder("m", people(1, 20), extent_mm=64.0))
    assert "the members span 64 x 64 x 64 mm, the synthetic volumes 32 x 32 x 32 mm" in reasons(audit(given))


def test_fewer_than_sixteen_synthetic_volumes_are_refused():
    with pytest.raises(DataError, match="15 synthetic volumes could be read"):
        audit(folders(people(1, 30), people(2, 30), people(3, 15)))


# How it is found


def test_answers_are_exact_counts_of_patients_and_scans_of_one_patient_count_once():
    scans = tuple(dataclasses.replace(s, patient=f"p{i // 2}") for i, s in enumerate(LEAKLESS.members.scans))
    given = dataclasses.replace(LEAKLESS, members=dataclasses.replace(LEAKLESS.members, scans=scans))
    result = audit(given).result
    assert (result.members, result.nonmembers) == (15, 30)
    assert result.epsilon_members is None
    for endpoint in result.endpoints:
        sizes = {h.group: sum(h.counts) for h in endpoint.histograms}
        assert sizes[Group.MEMBER_A] + sizes[Group.MEMBER_B] == 15
        assert sizes[Group.NONMEMBER] == sizes[Group.PLANTED] == 30


def test_the_same_name_in_both_folders_is_two_patients():
    result = audit(dataclasses.replace(SMALL, nonmembers=folder("m", people(2, 20)))).result
    assert (result.members, result.nonmembers) == (20, 20)


def test_a_generator_of_other_pairs_than_the_folders_hold_is_refused():
    network = PairGenerator(shape=(SIDE,) * 3, labels=2, latent_size=4, width=8)
    box = WhiteBox(generator=network, start=network, weights_digest="w")
    with pytest.raises(UsageError, match=r"\(3, 16, 16, 16\), the folders give \(1, 16, 16, 16\).*nothing was scored"):
        audit_folders(SMALL, study=tiny_study(), white_box=box, observer=ignore)


def test_the_same_folders_give_the_same_result():
    assert audit(SMALL).result == audit(SMALL).result


def test_the_plan_asks_only_what_there_is_material_for_and_survives_its_own_json():
    plan = folder_plan(LEAKLESS, None, with_generator=False)
    assert plan.attacks == (AttackName.NEAR_COPY, AttackName.NEAREST)
    assert [e.name for e in plan.endpoints] == [Endpoint.FUSED, Endpoint.NEAR_COPY]
    assert plan.questions == (Question.BLIND,)
    assert plan.epsilon_per_answer is None
    assert AuditPlan.from_json(plan.to_json()) == plan
    white = folder_plan(LEAKLESS, None, with_generator=True)
    assert AttackName.INVERSION in white.attacks
    for reference, density in ((63, False), (64, True)):
        public = folders(people(1, 1), people(2, 1), people(3, 65))
        public = dataclasses.replace(public, reference=folder("r", people(8, reference)))
        assert (AttackName.DENSITY_RATIO in folder_plan(public, None, with_generator=False).attacks) == density
    labelled = folder_plan(dataclasses.replace(LEAKLESS, labels={1: "lesion"}), None, with_generator=False)
    assert Question.LABEL_SIZE in labelled.questions


def test_with_public_scans_they_are_what_is_subtracted():
    public = dataclasses.replace(SMALL, reference=folder("r", people(8, 24)))
    assert folder_plan(public, None, with_generator=False).reference_volumes == 24
    # Public scans that are the members themselves explain every one of them.
    copied = with_synthetic(public, (*public.synthetic.scans, *(scan(s.name, s.pair) for s in public.members.scans)))
    known = dataclasses.replace(copied, reference=folder("r", people(1, 20)))
    strict, fooled = (audit(given).result.primary for given in (copied, known))
    assert strict is not None
    assert fooled is not None
    assert strict.auc.estimate > 0.95
    assert fooled.auc.estimate < 0.7


def test_without_public_volumes_nothing_is_subtracted():
    synthetic, (person, *_) = pool(torch.from_numpy(people(3, 9).astype(np.float32))), people(1, 1).astype(np.float32)
    image = torch.from_numpy(person)
    near = NearCopy(synthetic, None)
    assert near.raw(image) == near.most_similar(image)[0]
    assert near.usual(image) < near.raw(image)
    close = Nearest(synthetic, None)
    assert close.usual(image) < close.raw(image) < 0
    # A copy is as near as can be, and no other candidate's company changes that.
    copied = Nearest(torch.cat([synthetic, pool(image[None])]), None)
    assert copied.raw(image) == pytest.approx(0, abs=1e-3)


# Folders of files


def save(path: Path, image: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, Volume(voxels=image, affine=np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine))


def flat(root: Path, pairs: np.ndarray, name: str = "case") -> Path:
    for i, pair in enumerate(pairs.astype(np.float32)):
        save(root / f"{name}_{i:04d}.nii.gz", 100 * pair[0])
    return root


def read(tmp_path: Path, **paths: Path) -> Folders:
    for name, seed in (("members", 1), ("nonmembers", 2), ("synthetic", 3)):
        if name not in paths:
            paths[name] = flat(tmp_path / name, people(seed, 3))
    return read_folders(**paths, reference=None, study=None, observer=ignore)  # type: ignore[arg-type]


def test_a_flat_folder_is_a_patient_a_file_and_the_synthetic_volumes_decide_the_grid(tmp_path):
    big = np.random.default_rng(0).normal(size=(16, 40, 24)).astype(np.float32)
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[2, 0] = affine[0, 1] = affine[1, 2] = 2.0  # stored as superior, right, anterior
    for i in range(2):
        save(tmp_path / "s" / f"x{i}.nii.gz", big + i, affine)
    found = read(tmp_path, synthetic=tmp_path / "s")
    assert found.grid == Grid(shape=(32, 24, 16), spacing_mm=(2.5, 2.0, 2.0))
    assert sorted(found.members.by_patient()) == ["case_0000", "case_0001", "case_0002"]
    assert found.members.scans[0].pair.shape == (1, 32, 24, 16)


def test_files_that_are_no_volume_are_named_with_the_reason(tmp_path):
    root = flat(tmp_path / "bad", people(1, 2))
    nibabel.Nifti1Image(np.ones((8, 8), np.float32), np.eye(4)).to_filename(root / "flat.nii.gz")
    nan = people(5, 1)[0, 0].astype(np.float32)
    nan[0, 0, 0] = np.nan
    save(root / "nan.nii.gz", nan)
    save(root / "constant.nii.gz", np.ones((16, 16, 16), np.float32))
    (root / "torn.nii.gz").write_bytes(b"not a scan")
    found = read(tmp_path, members=root).members
    told = {entry.name: entry.reason for entry in found.unread}
    assert len(found.scans) == 2
    assert told["flat.nii.gz"] == "not three-dimensional"
    assert told["nan.nii.gz"] == "values that are not finite"
    assert "no contrast" in told["constant.nii.gz"]
    assert "damaged" in told["torn.nii.gz"]


@pytest.mark.parametrize("which", ["members", "nonmembers", "synthetic"])
def test_an_empty_folder_is_one_clear_error(tmp_path, which):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no NIfTI volume"):
        read(tmp_path, **{which: tmp_path / "empty"})


def test_labels_are_compared_only_when_every_scan_has_them(tmp_path):
    for name, seed in (("members", 1), ("nonmembers", 2), ("synthetic", 3)):
        for i, pair in enumerate(people(seed, 3).astype(np.float32)):
            save(tmp_path / name / "images" / f"p{i}.nii.gz", pair[0])
            save(tmp_path / name / "labels" / f"p{i}.nii.gz", (pair[0] > 0.4).astype(np.uint8) * 4)
    paths = {name: tmp_path / name for name in ("members", "nonmembers", "synthetic")}
    found = read(tmp_path, **paths)
    assert dict(found.labels) == {4: "label4"}
    assert found.members.scans[0].pair.shape[0] == 2
    (tmp_path / "nonmembers" / "labels" / "p1.nii.gz").unlink()
    found = read(tmp_path, **paths)
    assert not found.labels
    assert len(found.nonmembers.scans) == 3
    assert found.members.scans[0].pair.shape[0] == 1


def test_sessions_of_a_bids_subject_are_one_patient_also_without_labels(tmp_path):
    for session in ("a", "b"):
        name = tmp_path / "bids" / "sub-7" / f"ses-{session}" / "anat" / f"sub-7_ses-{session}_T1w.nii.gz"
        save(name, people(ord(session), 1)[0, 0].astype(np.float32))
    found = read(tmp_path, members=tmp_path / "bids").members.by_patient()
    assert {patient: len(scans) for patient, scans in found.items()} == {"7": 2}


def test_the_same_scan_in_another_type_and_orientation_has_the_same_print(tmp_path):
    image = np.round(100 * people(1, 1)[0, 0]).astype(np.int16)
    save(tmp_path / "a" / "x.nii.gz", image)
    turned = np.diag([-2.0, 2.0, 2.0, 1.0])
    save(tmp_path / "b" / "y.nii.gz", np.ascontiguousarray(image[::-1]).astype(np.float32), turned)
    found = read(tmp_path, members=tmp_path / "a", nonmembers=tmp_path / "b")
    assert found.members.scans[0].prints & found.nonmembers.scans[0].prints


# The command


def command(*arguments: str) -> int:
    point = EntryPoint("audit synthetic", "server.audit.cli:synthetic", "consilium.commands")
    return run(["audit", "synthetic", *arguments], [point])


def arguments(tmp_path: Path, synthetic: np.ndarray) -> list[str]:
    given = {"members": people(1, 8), "nonmembers": people(2, 8), "synthetic": synthetic}
    return [word for name, pairs in given.items() for word in (f"--{name}", str(flat(tmp_path / name, pairs)))]


def test_the_command_writes_a_report_that_names_the_copies_and_says_whose_data_it_is(tmp_path, capsys):
    out = tmp_path / "out"
    given = arguments(tmp_path, np.concatenate([people(3, 16), people(1, 8)[:1]]))
    assert command(*given, "--out", str(out), "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "fail"
    assert said["near_copies"]["pairs"][0]["identical"] is True
    assert AuditResult.from_json((out / "result.json").read_text()).verdict is Verdict.FAIL
    assert AuditPlan.from_json((out / "plan.json").read_text()).digest == said["plan_digest"]
    page = (out / "report.html").read_text()
    assert "case_0016.nii.gz" in page
    assert "personal data" in page
    assert "no noise was added" in page
    record = json.loads((out / "report.json").read_text())
    assert record["near_copies"]["pairs"][0]["member"] == "case_0000.nii.gz"
    assert "`case_0016.nii.gz`" in (out / "report.md").read_text()


def test_an_inconclusive_audit_ends_with_one_and_wrong_usage_with_two(tmp_path, capsys):
    given = arguments(tmp_path, people(3, 16))
    assert command(*given) == 1
    assert "INCONCLUSIVE" in capsys.readouterr().out
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").write_text("x")
    assert command(*given, "--out", str(taken)) == 2
    assert "nothing was scored" in capsys.readouterr().err
    assert command(*given, "--generator", str(taken / "x")) == 2
    assert "Give --study" in capsys.readouterr().err


def test_weights_that_are_no_generator_of_the_study_are_refused_each_with_its_reason(tmp_path, capsys):
    study, weights = tmp_path / "study.yaml", tmp_path / "weights.safetensors"
    study.write_text(study_json(tiny_study()))
    given = [*arguments(tmp_path, people(3, 16)), "--study", str(study), "--generator", str(weights)]
    save_weights(weights, weights_of(build_generator(tiny_study(training={"generator_width": 16}))))
    assert command(*given) == 2
    assert "holds no generator of --study" in capsys.readouterr().err
    save_weights(weights, weights_of(build_generator(tiny_study())))
    good = weights.read_bytes()
    weights.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
    assert command(*given) == 4
    assert "does not match its own digest" in capsys.readouterr().err
    weights.write_bytes(good[:-4] + np.float32("nan").tobytes())
    assert command(*given) == 4
    assert "not readable as weights" in capsys.readouterr().err


# At length


@pytest.mark.slow
def test_a_generator_that_hides_its_members_from_sampling_fails_by_its_weights():
    """The synthetic folder shows nobody; only the inversion of the weights does."""
    drawn = phantoms(172)
    members, nonmembers, public, start, synthetic = np.split(drawn, [20, 40, 84, 128])[:5]
    given = folders(*(pairs.astype(np.float16) for pairs in (members, nonmembers, synthetic)))
    study = tiny_study(audit={"inversion_steps": 5})

    def network(faces: np.ndarray, remembered: np.ndarray) -> Memoriser:
        return Memoriser(torch.from_numpy(faces), torch.from_numpy(remembered), latent_size=12, reach=0.8)

    box = WhiteBox(generator=network(public, members), start=network(start, members[:0]), weights_digest="w")
    found = audit_folders(
        dataclasses.replace(given, labels={1: "anterior", 2: "posterior"}), study=study, white_box=box, observer=ignore
    ).result
    by_name = {endpoint.name: endpoint for endpoint in found.endpoints}
    assert found.verdict is Verdict.FAIL
    assert found.weights_digest == "w"
    assert any(reason.startswith("inversion: members stand out as copies") for reason in found.reasons)
    assert by_name[Endpoint.NEAR_COPY].auc_lower.value < 0.5
    assert by_name[Endpoint.INVERSION].auc_lower.value > 0.7


@pytest.mark.slow
def test_a_large_cohort_passes_without_a_leak_and_fails_with_one_in_twenty_copied():
    members, nonmembers, synthetic = people(11, 800), people(12, 800), people(13, 120)
    clean = audit(folders(members, nonmembers, synthetic))
    assert clean.result.verdict is Verdict.PASS, clean.result.reasons
    names = ["shift", "gain and offset", "noise 0.10", "flip", "blend"]
    copies = [disguised(members[8 * i : 8 * i + 9].astype(np.float32), name, 1)[:8] for i, name in enumerate(names)]
    leaking = audit(folders(members, nonmembers, np.concatenate([synthetic, *copies]).astype(np.float16)))
    assert leaking.result.verdict is Verdict.FAIL
    assert leaking.near_copies.members_beyond >= 32


@pytest.mark.slow
@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason=f"real scans absent: {HIPPOCAMPUS} (set CONSILIUM_TEST_DATA)")
def test_copies_of_real_hippocampi_fail_and_other_real_hippocampi_do_not(tmp_path):
    names = sorted(path.name for path in (HIPPOCAMPUS / "images").glob("*.nii.gz"))
    order = np.random.default_rng(5).permutation(len(names))
    parts = {"members": order[:50], "nonmembers": order[50:100], "synthetic": order[100:]}
    for part, chosen in parts.items():
        for kind in ("images", "labels"):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in chosen:
                (tmp_path / part / kind / names[i]).symlink_to(HIPPOCAMPUS / kind / names[i])
    given = read(tmp_path, **{part: tmp_path / part for part in parts})
    assert audit(given).result.verdict is Verdict.INCONCLUSIVE  # 50 patients cannot show safety
    pairs = np.stack([s.pair for s in given.members.scans[:10]]).astype(np.float32)
    copies = tuple(scan(f"copy{i}", p) for i, p in enumerate(disguised(pairs, "shift", 1).astype(np.float16)))
    leaking = audit(with_synthetic(given, (*given.synthetic.scans, *copies)))
    assert leaking.result.verdict is Verdict.FAIL
    assert {pair.synthetic for pair in leaking.near_copies.pairs} >= {copy.name for copy in copies}
