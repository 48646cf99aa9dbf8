"""`simulate`, `audit`, `release`, `report`: exit codes, and texts that say what to do."""

import json
import shutil
from pathlib import Path

import pytest
from loopback_sites import LoopbackSites
from scripted_hospitals import NOW, STUDY, hold, scripted

from common.cli import run
from common.errors import ExitCode
from common.evidence.verification import verify_bundle
from common.protocol.messages import RefusalCode, RefusalReply, ScoreOrder
from common.settings.load import settings_yaml


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(settings_yaml(STUDY))
    return path


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the gate refused: one hospital would not answer the audit."""
    sites = scripted()
    honest = sites["a"]
    sites["a"] = lambda order: RefusalReply(code=RefusalCode.BUDGET) if isinstance(order, ScoreOrder) else honest(order)
    return hold(tmp_path_factory.mktemp("refused") / "run", LoopbackSites(sites))[1].path


def test_audit_judges_again_from_the_stored_answers(released, capsys: pytest.CaptureFixture[str]):
    assert run(["audit", str(released[1].path), "--json"]) == ExitCode.DONE
    body = json.loads(capsys.readouterr().out)
    assert (body["verdict"], body["as_recorded"]) == ("pass", True)


def test_audit_says_when_the_answers_no_longer_give_the_recorded_result(
    released, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(released[1].path, tmp_path / "run")
    answers = tmp_path / "run" / "audit" / "answers.json"
    body = json.loads(answers.read_text())
    body["replies"]["a"]["histograms"][0]["counts"][1] += 5
    answers.write_text(json.dumps(body))
    run(["audit", str(tmp_path / "run")])
    assert "the same result as the run recorded: NO" in capsys.readouterr().out


def test_audit_of_a_refused_run_is_exit_code_one(refused: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["audit", str(refused)]) == ExitCode.REFUSED
    assert "INCONCLUSIVE" in capsys.readouterr().out


def test_release_copies_out_what_verifies(released, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["release", str(released[1].path), "--out", str(tmp_path / "release")]) == ExitCode.DONE
    assert "RELEASE: campaign" in capsys.readouterr().out
    verify_bundle(tmp_path / "release", trusted_key=None, now=NOW)


def test_release_of_a_refused_run_copies_nothing(refused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["release", str(refused), "--out", str(tmp_path / "release")]) == ExitCode.REFUSED
    assert "nothing was released" in capsys.readouterr().err
    assert not (tmp_path / "release").exists()


def test_release_of_a_tampered_bundle_copies_nothing(released, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(released[1].path, tmp_path / "run")
    card = tmp_path / "run" / "release" / "card.md"
    card.write_bytes(card.read_bytes().replace(b"epsilon", b"Epsilon", 1))
    assert run(["release", str(tmp_path / "run"), "--out", str(tmp_path / "release")]) == ExitCode.REFUSED
    assert "card.md" in capsys.readouterr().err
    assert not (tmp_path / "release").exists()


def test_report_shows_a_run_and_a_release(released, capsys: pytest.CaptureFixture[str]):
    folder = released[1]
    assert run(["report", str(folder.path)]) == ExitCode.DONE
    assert f"report   {folder.report}" in capsys.readouterr().out
    assert run(["report", str(folder.release), "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["outcome"] == "RELEASE"


@pytest.mark.parametrize("command", [["audit"], ["report"], ["release", "--out", "elsewhere"]])
def test_a_folder_that_is_no_run_is_wrong_usage(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]):
    assert run([*command, str(tmp_path)]) == ExitCode.USAGE
    assert "nothing was done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "/nowhere"], "--data /nowhere is not a folder"),
        (["--sites", "1"], "fewer than the study's quorum of 2"),
        (["--patients", "10"], "the study needs 20"),
        (["--engine", "spark"], "Choose one of local, flower"),
    ],
)
def test_bad_arguments_of_simulate_write_nothing(
    study: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["simulate", str(study), "--out", str(tmp_path / "run"), *arguments]) == ExitCode.USAGE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_simulate_refuses_a_folder_that_holds_another_run(study: Path, released, capsys: pytest.CaptureFixture[str]):
    assert run(["simulate", str(study), "--out", str(released[1].path)]) == ExitCode.USAGE
    assert "holds another run" in capsys.readouterr().err
