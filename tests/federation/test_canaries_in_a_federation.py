"""The mechanism audit through a whole simulated run: what leaves, what the result says, what a stop changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_federation import STUDY, federate, kinds

from common.measure.one_run import GUESS_RULES
from common.telemetry.events import Event, RoundFinished, StageFinished
from server.audit.result import AuditResult, MechanismVerdict
from server.audit_stage import AuditFolder, rejudge
from server.run_folder import RunFolder

pytestmark = pytest.mark.slow  # whole federations


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return federate(tmp_path_factory.mktemp("canaries"))


def guessed(run: RunFolder) -> object:
    return json.loads((run.audit / "canaries.json").read_text())


def test_the_result_holds_the_mechanism_audit_of_all_sites(finished: RunFolder) -> None:
    result = AuditResult.from_json((finished.audit / "result.json").read_text())
    assert result.mechanism is not None
    assert result.mechanism.canaries == 3 * STUDY.audit.canaries
    assert result.mechanism.verdict is not MechanismVerdict.VIOLATION
    order = kinds(finished)
    assert order.index("round") < order.index("canaries") < order.index("audit-answers")


def test_only_totals_were_sent(finished: RunFolder) -> None:
    told = json.loads((finished.audit / "canaries.json").read_text())
    assert sorted(told["replies"]) == list(finished.facts.sites)
    for guesses in told["replies"].values():
        assert [g["guesses"] for g in guesses] == [rule.guesses(STUDY.audit.canaries) for rule in GUESS_RULES]
        assert {key for g in guesses for key in g} == {"rule", "guesses", "correct"}


def test_the_verdict_can_be_reached_again_from_the_folder(finished: RunFolder) -> None:
    _, as_recorded = rejudge(finished.study, AuditFolder(path=finished.audit))
    assert as_recorded


@pytest.mark.parametrize("moment", ["round 1", "training", "canaries"])
def test_a_stop_changes_no_guess(finished: RunFolder, tmp_path: Path, moment: str) -> None:
    def stop(event: Event) -> None:
        match event:
            case StageFinished(stage=stage) if stage == moment:
                raise KeyboardInterrupt
            case RoundFinished(round=1) if moment == "round 1":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path, observer=stop)
    assert guessed(federate(tmp_path)) == guessed(finished)
