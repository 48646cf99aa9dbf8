"""Settings of an ensemble; a study without one is the study it was, to the last byte of its JSON."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from common.settings.load import load_study, parse_study, settings_yaml, study_digest, study_json, study_problems
from common.settings.study import Strategy
from tests.tiny_studies import tiny_study

ROOT = Path(__file__).resolve().parents[3]
# Made by the code as it was before there were ensembles.
TINY_BEFORE = "a957e85a4c902b37a49c19acc32b09af8d59351868d61bbd9e6d5f14397152b6"
DEMO_BEFORE = "1435744a818d5b6ddcf6b313081f32a332762dd28559c9748cd5c179e75053fb"


def test_studies_from_before_ensembles_keep_their_digest_whether_they_name_the_strategy_or_not():
    assert study_digest(tiny_study()) == TINY_BEFORE
    assert study_digest(tiny_study(federation={"strategy": "fedavg"})) == TINY_BEFORE
    assert study_digest(load_study(ROOT / "deploy" / "studies" / "demo.yaml")) == DEMO_BEFORE


def test_an_ensemble_states_everything_that_decides_what_is_released():
    study = tiny_study(federation={"strategy": "ensemble", "fine_tune_rounds": 2})
    text = study_json(study)
    for part in ('"strategy":"ensemble"', '"fine_tune_rounds":2', '"distil_steps":400', '"distil_volumes":512'):
        assert part in text
    assert parse_study(text) == study
    digests = {
        study_digest(tiny_study(federation={"strategy": "ensemble", "fine_tune_rounds": 2, key: 64}))
        for key in ("distil_steps", "distil_volumes", "quorum")
    }
    assert len(digests | {study_digest(study)}) == 4


def test_an_ensemble_survives_its_own_yaml(tmp_path: Path):
    study = tiny_study(federation={"strategy": "ensemble", "fine_tune_rounds": 1})
    (tmp_path / "study.yaml").write_text(settings_yaml(study))
    assert load_study(tmp_path / "study.yaml") == study
    assert study.federation.strategy is Strategy.ENSEMBLE


@pytest.mark.parametrize(
    ("federation", "problem"),
    [
        ({"strategy": "ensemble"}, "needs fine_tune_rounds of at least 1"),
        ({"fine_tune_rounds": 1}, "fine_tune_rounds is of strategy ensemble only"),
        ({"distil_steps": 10}, "distil_steps is of strategy ensemble only"),
        ({"strategy": "median"}, "'fedavg' or 'ensemble'"),
    ],
)
def test_a_setting_without_its_strategy_is_refused(federation: dict, problem: str):
    with pytest.raises(ValidationError, match=problem):
        tiny_study(federation=federation)


def test_an_ensemble_that_contradicts_the_rest_of_the_study_is_refused():
    ensemble = {"strategy": "ensemble", "fine_tune_rounds": 4, "distil_volumes": 16}
    study = tiny_study(federation=ensemble, warm_start={"batch": 32, "volumes": 64}, course={"every_rounds": 1})
    found = "\n".join(study_problems(study))
    assert "federation.fine_tune_rounds: 4 are more than the 3 of training.rounds" in found
    assert "federation.distil_volumes: 16 are fewer than the 32 of warm_start.batch" in found
    assert "course: it chooses among averaged generators" in found
