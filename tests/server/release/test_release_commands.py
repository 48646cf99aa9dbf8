"""`consilium verify` and `consilium sample` as a user meets them: output, files and exit codes."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from common.cli import run
from common.volume.nifti import read_nifti
from server.release.evidence import ReleaseEvidence


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def fresh(publish, evidence: ReleaseEvidence, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A release that is valid at the time of this test run."""
    return publish(tmp_path_factory.mktemp("fresh"), evidence, now=datetime.now(UTC))


@pytest.fixture(scope="module")
def fresh_refusal(publish, evidence: ReleaseEvidence, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    return publish(tmp_path_factory.mktemp("fresh"), replace(evidence, audit=None), now=datetime.now(UTC))


def test_verify_of_a_release_exits_0_and_says_who_signed_and_what_it_cost(
    fresh: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["verify", str(fresh)]) == 0
    shown = capsys.readouterr().out
    for words in ("an authentic RELEASE of tiny", "SIMULATED", "site-2: trained on epsilon", "signed by key", "--key"):
        assert words in shown


def test_verify_of_an_authentic_refusal_says_so_and_exits_1(fresh_refusal: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["verify", str(fresh_refusal)]) == 1
    shown = capsys.readouterr().out
    assert "VERIFIED AS A REFUSAL: INCONCLUSIVE" in shown
    assert "there was no audit" in shown


def test_verify_of_a_changed_bundle_exits_1_and_names_the_file(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bundle = Path(shutil.copytree(fresh, tmp_path / "bundle"))
    (bundle / "card.md").write_text((bundle / "card.md").read_text().replace("SYNTHETIC", "SYNTHETIc", 1))
    assert run(["verify", str(bundle)]) == 1
    shown = capsys.readouterr()
    assert "card.md: was changed after it was signed" in shown.out + shown.err
    assert "authentic" not in shown.out


def test_verify_with_the_right_key_is_pinned_and_with_another_exits_1(
    fresh: Path, fresh_refusal: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["verify", str(fresh), "--key", str(fresh / "auditor.pub.pem"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["key_pinned"], facts["released"]) == (True, True)
    assert facts["sites"]["site-1"]["members"]["accountant"] == "prv"
    assert run(["verify", str(fresh), "--key", str(fresh_refusal / "auditor.pub.pem")]) == 1


@pytest.mark.parametrize("arguments", [["nowhere"], ["--key", "nowhere", "."]])
def test_verify_of_what_is_not_there_is_wrong_usage(arguments: list[str]):
    assert run(["verify", *arguments]) == 2


def test_sample_draws_new_volumes_that_depend_on_the_seed_alone(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for out, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert run(["sample", str(fresh), "--n", "3", "--out", out, "--seed", seed]) == 0
    assert "drawn with seed 5 from release" in capsys.readouterr().out
    a, b, c = (read_nifti(next((tmp_path / out).glob("sub-synth00002/anat/*angio*"))).voxels for out in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert len(list((tmp_path / "a").glob("sub-*"))) == 3


def test_sample_without_a_seed_draws_a_new_one_each_time(fresh: Path, capsys: pytest.CaptureFixture[str]):
    seeds = set()
    for out in ("a", "b"):
        assert run(["sample", str(fresh), "--n", "1", "--out", out, "--json"]) == 0
        seeds.add(json.loads(capsys.readouterr().out)["seed"])
    assert len(seeds) == 2


def test_sampled_folder_says_which_release_it_came_from(fresh: Path, tmp_path: Path):
    assert run(["sample", str(fresh), "--n", "1", "--out", "more", "--seed", "1"]) == 0
    decision = json.loads((fresh / "decision.json").read_text())["decision_id"]
    description = json.loads((tmp_path / "more" / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert decision in description["HowToAcknowledge"]
    assert "SIMULATED" in (tmp_path / "more" / "README").read_text()


def test_sample_of_a_refusal_or_of_a_changed_release_draws_nothing(fresh: Path, fresh_refusal: Path, tmp_path: Path):
    assert run(["sample", str(fresh_refusal), "--n", "1", "--out", "more"]) == 1
    bundle = Path(shutil.copytree(fresh, tmp_path / "bundle"))
    weights = bytearray((bundle / "generator.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "generator.safetensors").write_bytes(bytes(weights))
    assert run(["sample", str(bundle), "--n", "1", "--out", "more"]) == 1
    assert not (tmp_path / "more").exists()


def test_sample_never_writes_into_a_folder_that_holds_something(fresh: Path, tmp_path: Path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mine").write_bytes(b"precious")
    assert run(["sample", str(fresh), "--n", "1", "--out", "more"]) == 2
    assert [path.name for path in (tmp_path / "more").iterdir()] == ["mine"]
