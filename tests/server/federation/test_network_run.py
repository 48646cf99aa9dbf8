"""What becomes of a run, decided from what can be seen of it; and what `start` refuses before anything is written."""

import dataclasses
import fcntl
import json
from datetime import UTC, datetime, timedelta

import pytest

from common.errors import IntegrityError, Unreachable, UsageError
from common.settings.load import settings_yaml, study_digest
from server.federation.control import SubmittedRun
from server.federation.network_run import (
    ATTEMPTS,
    Activity,
    Look,
    Submission,
    activity,
    look_at,
    network_runs,
    resume,
    run_path,
    start,
    stop,
)
from server.federation.registry import Registry
from server.run_folder import Engine, RunFacts, RunFolder, RunState
from tests.provisioned import NOW, files, make_federation, site_request
from tests.tiny_studies import tiny_study

STUDY = tiny_study(federation={"quorum": 2})
FACTS = RunFacts(
    engine=Engine.NETWORK, sites=("site-1", "site-2"), seed=1, simulated=False, study_digest=study_digest(STUDY)
)
SUBMITTED = Submission(run_id=9, submitted=NOW, attempts=1, steps=3)
RUNNING = SubmittedRun(run_id=9, status="running", detail="")
FINISHED = SubmittedRun(run_id=9, status="finished", detail="failed")
# A ServerApp at work.
AT_WORK = Look(
    facts=FACTS, submission=SUBMITTED, locked=True, was_locked=True, failure=None, failed_at=None, known=RUNNING
)


def seen(**changes: object) -> Look:
    return dataclasses.replace(AT_WORK, **changes)


def tried(attempts: int) -> Submission:
    return dataclasses.replace(SUBMITTED, attempts=attempts)


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        (seen(), Activity.WORKING),
        # The outcome is signed: nothing else matters.
        (seen(facts=dataclasses.replace(FACTS, state=RunState.FINISHED), locked=True), Activity.FINISHED),
        (seen(facts=dataclasses.replace(FACTS, state=RunState.FINISHED), submission=None), Activity.FINISHED),
        # Never submitted, or stopped by somebody: nobody begins it but a person.
        (seen(submission=None, locked=False), Activity.STOPPED),
        (seen(submission=dataclasses.replace(SUBMITTED, stopped=True), locked=False), Activity.STOPPED),
        (seen(submission=dataclasses.replace(SUBMITTED, stopped=True), locked=True), Activity.STOPPED),
        # Submitted a moment ago, no ServerApp yet.
        (seen(locked=False, was_locked=False), Activity.WORKING),
        # A lock that vanished with its process, whatever the SuperLink still believes.
        (seen(locked=False), Activity.DEAD),
        (seen(locked=False, known=FINISHED), Activity.DEAD),
        (seen(locked=False, known=None), Activity.DEAD),
        (seen(locked=False, was_locked=False, known=None), Activity.DEAD),  # the SuperLink lost its database
        (seen(locked=False, was_locked=False, known=FINISHED), Activity.DEAD),
        (seen(locked=False, submission=tried(ATTEMPTS)), Activity.GIVEN_UP),
        (seen(locked=False, submission=tried(ATTEMPTS - 1)), Activity.DEAD),
        # It said why it ended.
        (seen(locked=False, failure="IntegrityError", failed_at=NOW, known=FINISHED), Activity.FAILED),
        (seen(locked=False, failure="IntegrityError", failed_at=NOW), Activity.WORKING),
        (seen(locked=False, failure="Unreachable", failed_at=NOW, known=FINISHED), Activity.WAITING),
        (
            seen(locked=False, failure="Unreachable", failed_at=NOW - timedelta(seconds=61), known=FINISHED),
            Activity.DEAD,
        ),
        (
            seen(locked=False, failure="Unreachable", failed_at=NOW, known=FINISHED, submission=tried(ATTEMPTS)),
            Activity.GIVEN_UP,
        ),
    ],
)
def test_what_becomes_of_a_run(look, expected):
    assert activity(look, NOW) is expected


@pytest.fixture
def federation(tmp_path):
    folder = make_federation(tmp_path / "F")
    for name in ("site-1", "site-2", "site-3"):
        Registry(folder).enrol(site_request(name), now=NOW, days=30)
    return folder


@pytest.fixture
def run(federation) -> RunFolder:
    return RunFolder.create_or_resume(federation.runs / "tiny", STUDY, FACTS)


def study_file(folder, study=STUDY):
    path = folder / "study.yaml"
    path.write_text(settings_yaml(study))
    return path


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (("site-1", "site-9"), "site-9; nothing was started. Enrolled: site-1, site-2, site-3"),
        (("site-1", "site-1"), "named twice"),
        (("site-1",), "fewer than the study's quorum of 2"),
        ((), "0 sites are fewer"),
    ],
)
def test_sites_that_cannot_take_part_are_refused_before_anything_is_written(federation, tmp_path, sites, words):
    before = files(federation.path)
    with pytest.raises(UsageError, match=words):
        start(federation.path, study_file(tmp_path), sites=sites, name=None, seed=None, now=NOW)
    assert files(federation.path) == before


def test_a_site_whose_certificate_has_ended_or_that_was_revoked_cannot_take_part(federation, tmp_path):
    Registry(federation).revoke("site-2", reason="left", now=NOW)
    with pytest.raises(UsageError, match="site-2; nothing was started"):
        start(federation.path, study_file(tmp_path), sites=("site-1", "site-2"), name=None, seed=None, now=NOW)
    with pytest.raises(UsageError, match="Enrolled: none"):
        start(
            federation.path,
            study_file(tmp_path),
            sites=("site-1", "site-3"),
            name=None,
            seed=None,
            now=NOW + timedelta(days=31),
        )


def test_without_services_nothing_is_begun(federation, tmp_path):
    before = files(federation.path)
    with pytest.raises(Unreachable, match="federation serve"):
        start(federation.path, study_file(tmp_path), sites=None, name=None, seed=None, now=NOW)
    assert files(federation.path) == before


def test_a_run_is_resumed_and_stopped_only_where_it_is(federation, run):
    for act in (resume, stop):
        with pytest.raises(UsageError, match="not a run folder"):
            act(federation.path, "other", now=NOW)
    with pytest.raises(Unreachable):
        resume(federation.path, "tiny", now=NOW)
    assert Submission.read(run) is None


@pytest.mark.parametrize("name", ["..", "../F", "a/b", "A", "", "-a", "a" * 64, "a b", "a\n"])
def test_a_name_leads_nowhere_else(federation, name):
    with pytest.raises(UsageError, match="no name of a run"):
        run_path(federation, name)


def test_a_submission_reads_back_and_a_damaged_one_says_so(run):
    SUBMITTED.write(run)
    assert Submission.read(run) == SUBMITTED
    file = run.path / "submission.json"
    file.write_text(file.read_text().replace("run_id", "walk_id"))
    with pytest.raises(IntegrityError, match="damaged; nothing was done"):
        Submission.read(run)


def test_a_run_is_seen_from_outside_without_disturbing_it(run):
    assert not look_at(run, None).locked
    dataclasses.replace(SUBMITTED, submitted=datetime.now(UTC) - timedelta(seconds=5)).write(run)
    with run.locked():
        look = look_at(run, None)
        assert look.locked
        assert look.was_locked
    with run.locked():  # the look has not kept it
        pass
    look = look_at(run, None)
    assert not look.locked
    assert look.was_locked
    assert look.failure is None
    run.failure.write_text(json.dumps({"kind": "Unreachable", "text": "too few"}))
    look = look_at(run, None)
    assert look.failure == "Unreachable"
    assert look.failed_at is not None


def test_a_lock_from_before_the_submission_does_not_count(run):
    with run.locked():
        pass
    dataclasses.replace(SUBMITTED, submitted=datetime.now(UTC) + timedelta(seconds=5)).write(run)
    assert not look_at(run, None).was_locked


def test_only_whole_runs_are_listed(federation, run):
    (federation.runs / "half").mkdir()
    assert [found.path.name for found in network_runs(federation)] == ["tiny"]


def test_a_look_waits_for_nobody(run):
    with (run.path / ".submission.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not look_at(run, None).locked
