"""Three hospitals and an ensemble, the whole way: the student is what is audited, and a stop changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tiny_federation import PATIENTS, STUDY, generator_digest, kinds

from common.evidence.chain import EvidenceChain
from common.settings.study import Study
from common.telemetry.events import Event, Progress, RoundFinished, ignore
from server.evidence_log import last_record
from server.run_folder import Engine, RunFolder, read_decision
from server.simulate import simulate
from server.simulated_sites import Cohorts

pytestmark = pytest.mark.slow  # whole federations

FEDERATION = {
    **STUDY.federation.model_dump(),
    "strategy": "ensemble",
    "fine_tune_rounds": 2,
    "distil_steps": 4,
    "distil_volumes": 16,
}
TRAINING = {**STUDY.training.model_dump(), "rounds": 3}
ENSEMBLE = Study.model_validate({**STUDY.model_dump(), "federation": FEDERATION, "training": TRAINING})


def hold(folder: Path, observer: Callable[[Event], None] = ignore) -> RunFolder:
    return simulate(
        ENSEMBLE,
        folder / "run",
        Cohorts(folder=None, sites=3, phantoms=PATIENTS),
        engine=Engine.LOCAL,
        seed=0,
        observer=observer,
        now=lambda: datetime.now(UTC),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return hold(tmp_path_factory.mktemp("ensemble"))


def body(run: RunFolder, kind: str) -> dict:
    record = last_record(EvidenceChain(run.evidence), kind)
    assert record is not None
    return dict(record.body)


def test_the_student_of_the_sites_last_generators_is_audited_and_decided_on(finished: RunFolder):
    assert kinds(finished)[4:8] == ["round", "round", "round", "distillation"]
    distilled, last = body(finished, "distillation"), body(finished, "round")
    assert distilled["own_digests"] == last["replies"]
    assert len(set(distilled["own_digests"].values())) == 3
    assert distilled["common_digest"] == last["average_digest"]
    student = distilled["generator_digest"]
    assert student == body(finished, "audit-question")["weights_digest"] == generator_digest(finished)
    assert student not in {*last["replies"].values(), last["average_digest"]}


def test_no_site_refused_its_own_generator_and_the_gate_has_nothing_against_the_ledgers(finished: RunFolder):
    for record in EvidenceChain(finished.evidence).verify():
        if record.kind == "round":
            assert record.body["excluded"] == {}
    reasons = read_decision(finished.release).reasons
    assert not [reason for reason in reasons if "steps" in reason or "receipt" in reason or "spent" in reason]


def test_the_report_says_that_a_student_was_audited(finished: RunFolder):
    page = finished.report.read_text()
    assert "one student of all of them" in page
    assert "In the last 2 of the rounds" in page


@pytest.mark.parametrize("moment", ["a fine-tune round", "distillation"])
def test_an_ensemble_that_was_stopped_goes_on_to_the_same_student(tmp_path: Path, finished: RunFolder, moment: str):
    def ctrl_c(event: Event) -> None:
        match event:
            case RoundFinished(round=2) if moment == "a fine-tune round":
                raise KeyboardInterrupt
            case Progress(task="distillation", done=3) if moment == "distillation":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path, ctrl_c)
    resumed = hold(tmp_path)
    assert generator_digest(resumed) == generator_digest(finished)
    assert kinds(resumed) == kinds(finished)
    assert body(resumed, "distillation") == body(finished, "distillation")
