"""Run folders: one study, one seed, one process."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import IntegrityError, UsageError
from common.settings.load import study_digest
from server.run_folder import Engine, RunFacts, RunFolder, RunState
from tests.tiny_studies import tiny_study

STUDY = tiny_study()
FACTS = RunFacts(
    engine=Engine.LOCAL,
    sites=("site-1", "site-2"),
    seed=7,
    simulated=True,
    study_digest=study_digest(STUDY),
)


def test_a_new_run_reads_back_its_facts_and_its_study(tmp_path: Path):
    run = RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    assert run.facts == FACTS
    assert run.study == STUDY


def test_the_same_run_is_resumed(tmp_path: Path):
    RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    assert RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS).facts.state is RunState.OPEN


def test_a_finished_run_says_its_outcome_for_ever(tmp_path: Path):
    RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS).finish("RELEASE")
    facts = RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS).facts
    assert (facts.state, facts.outcome) == (RunState.FINISHED, "RELEASE")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(FACTS, seed=8), "seed is 7, not 8"),
        (replace(FACTS, sites=("site-1",)), "sites is site-1, site-2, not site-1"),
        (replace(FACTS, engine=Engine.FLOWER), "engine is local, not flower"),
    ],
)
def test_another_run_in_the_folder_is_refused_and_named(tmp_path: Path, other: RunFacts, named: str):
    RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    with pytest.raises(UsageError, match=named):
        RunFolder.create_or_resume(tmp_path / "run", STUDY, other)
    assert RunFolder.open(tmp_path / "run").facts == FACTS


def test_another_study_in_the_folder_is_refused(tmp_path: Path):
    RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    other = tiny_study(study="another")
    with pytest.raises(UsageError, match="holds another run"):
        RunFolder.create_or_resume(tmp_path / "run", other, replace(FACTS, study_digest=study_digest(other)))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.docx").write_bytes(b"")
    with pytest.raises(UsageError, match="no Consilium run wrote"):
        RunFolder.create_or_resume(tmp_path, STUDY, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_a_creation_that_was_killed_halfway_is_completed(tmp_path: Path):
    run = RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    run.facts_file.unlink()  # it is written last
    assert RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS).facts == FACTS


def test_a_damaged_run_json_is_one_clear_error(tmp_path: Path):
    run = RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    run.facts_file.write_text(run.facts_file.read_text()[:40])
    with pytest.raises(IntegrityError, match=r"run\.json is damaged"):
        RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)


def test_a_study_that_was_edited_in_the_folder_is_noticed(tmp_path: Path):
    run = RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    run.study_file.write_text(run.study_file.read_text().replace('"rounds":3', '"rounds":4'))
    with pytest.raises(IntegrityError, match="is not the study"):
        _ = run.study


def test_a_missing_run_is_wrong_usage(tmp_path: Path):
    with pytest.raises(UsageError, match="is not a run folder"):
        RunFolder.open(tmp_path)


def test_only_the_owner_can_reach_the_signing_key(tmp_path: Path):
    run = RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    assert run.auditor_key.parent.stat().st_mode & 0o077 == 0


def hold(path: Path, ready, release) -> None:
    with RunFolder.open(path).locked():
        ready.set()
        release.wait(10)


def test_two_processes_cannot_work_in_one_folder_and_a_dead_one_leaves_no_lock(tmp_path: Path):
    run = RunFolder.create_or_resume(tmp_path / "run", STUDY, FACTS)
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(run.path, ready, release))
    other.start()
    assert ready.wait(10)
    with pytest.raises(UsageError, match=f"another process .process {other.pid}. works in"), run.locked():
        pass
    other.kill()
    other.join()
    with run.locked():
        pass
