"""Three hospitals and a warm-up, the whole way: it shows in the generator, the ledgers, the evidence and the report."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tiny_federation import PATIENTS, STUDY, generator_digest, kinds

from common.evidence.chain import EvidenceChain
from common.evidence.predicate import Outcome
from common.privacy.calibration import plan_of
from common.privacy.mechanism_json import mechanism_json
from common.settings.study import Study
from common.telemetry.events import Event, Progress, StageFinished, ignore
from server.evidence_log import last_record
from server.run_folder import Engine, RunFolder, read_decision
from server.simulate import simulate
from server.simulated_sites import Cohorts
from tests.warmed_study import WARM_UP

pytestmark = pytest.mark.slow  # whole federations

WARMED = Study.model_validate({**STUDY.model_dump(), "warm_up": WARM_UP})


def hold(folder: Path, observer: Callable[[Event], None] = ignore) -> RunFolder:
    return simulate(
        WARMED,
        folder / "run",
        Cohorts(folder=None, sites=3, phantoms=PATIENTS),
        engine=Engine.LOCAL,
        seed=0,
        observer=observer,
        now=lambda: datetime.now(UTC),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return hold(tmp_path_factory.mktemp("warmed"))


def body(run: RunFolder, kind: str) -> dict:
    record = last_record(EvidenceChain(run.evidence), kind)
    assert record is not None
    return dict(record.body)


def test_warm_up_lies_between_enrolment_and_the_first_round(finished: RunFolder):
    assert kinds(finished)[:6] == ["campaign", "warm-start", "enrolment", "audit-plan", "warm-up", "round"]
    assert sorted(body(finished, "warm-up")["answers"]) == ["site-1", "site-2", "site-3"]


def test_training_begins_with_the_fitted_generator_and_the_audit_compares_with_the_public_start(finished: RunFolder):
    warmed, public = body(finished, "warm-up"), body(finished, "warm-start")
    first = next(r.body for r in EvidenceChain(finished.evidence).verify() if r.kind == "round")
    assert warmed["start_digest"] == public["generator_digest"] != warmed["generator_digest"]
    assert first["start_digest"] == warmed["generator_digest"]
    assert body(finished, "audit-question")["reference_digest"] == public["generator_digest"]


def test_every_ledger_holds_the_release_once_and_the_gate_agrees(finished: RunFolder):
    planned = plan_of(WARMED).warm_up
    assert planned is not None
    for statement in body(finished, "statements").values():
        assert [m for m in statement["members"] if "gaussian_release" in m] == [mechanism_json(planned)]
        assert not [m for m in statement["nonmembers"] if "gaussian_release" in m]
    decision = read_decision(finished.release)
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert not [reason for reason in decision.reasons if "warm-up" in reason]


def test_report_says_what_was_released_and_what_it_cost(finished: RunFolder):
    page = finished.report.read_text()
    assert "Warm-up release:" in page
    assert "epsilon 2.00 by itself" in page  # a quarter of 8
    assert "one sum of measurements" in page


@pytest.mark.parametrize("moment", ["the fit", "the stage"])
def test_a_warm_up_that_was_stopped_goes_on_to_the_same_generator(tmp_path: Path, finished: RunFolder, moment: str):
    def ctrl_c(event: Event) -> None:
        match event:
            case Progress(task="warm-up", done=2) if moment == "the fit":
                raise KeyboardInterrupt
            case StageFinished(stage="warm-up") if moment == "the stage":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path, ctrl_c)
    resumed = hold(tmp_path)
    assert body(resumed, "warm-up") == body(finished, "warm-up")
    assert generator_digest(resumed) == generator_digest(finished)
    assert kinds(resumed) == kinds(finished)
