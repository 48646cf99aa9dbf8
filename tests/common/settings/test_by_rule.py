"""`by-rule`: a study file is whole once it is read, and the rule never guesses what was not stated."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import SettingsError
from common.privacy.rule import choose
from common.settings.load import load_study, parse_study, study_digest, study_json

HIPPOCAMPUS = (Path(__file__).parents[3] / "deploy" / "studies" / "hippocampus.yaml").read_text()


def by_rule(*changes: tuple[str, str]) -> str:
    text = HIPPOCAMPUS
    for old, new in (
        ("sampling_probability: 0.5", "sampling_probability: by-rule"),
        ("clip_norm: 1.0", "clip_norm: by-rule"),
        ("critic_steps_per_round: 10", "critic_steps_per_round: by-rule"),
        ("critic_steps_per_generator_step: 5", "critic_steps_per_generator_step: by-rule"),
        *changes,
    ):
        assert old in text
        text = text.replace(old, new)
    return text


def test_every_place_is_filled_with_what_the_rule_chooses(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(by_rule())
    study = load_study(path)
    choice = choose(reference_patients=30, target_epsilon=8.0, delta=1e-3, warm_start=True)
    assert study.privacy.sampling_probability == choice.sampling_probability
    assert study.privacy.clip_norm == choice.clip_norm
    assert 0 <= study.training.rounds * study.training.critic_steps_per_round - choice.steps < study.training.rounds
    assert study.training.critic_steps_per_generator_step == choice.critic_steps_per_generator_step


def test_what_a_hospital_approves_holds_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(by_rule())
    text = study_json(load_study(path))
    assert "by-rule" not in text
    assert study_digest(parse_study(text)) == study_digest(load_study(path))


def test_from_nothing_the_pace_is_adaptive(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(by_rule(("steps: 400", "steps: 0")))
    assert load_study(path).training.critic_steps_per_generator_step == "adaptive"


@pytest.mark.parametrize(("old", "missing"), [("target_epsilon: 8.0", "target_epsilon"), ("delta: 1.0e-3", "delta")])
def test_the_rule_says_what_it_needs(tmp_path: Path, old: str, missing: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(by_rule((old, f"{missing}: null")))
    with pytest.raises(SettingsError, match=rf"`by-rule` needs privacy\.{missing} as a positive number; nothing was"):
        load_study(path)


def test_an_adaptive_pace_needs_a_loss_with_a_boundary(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(by_rule(("steps: 400", "steps: 0"), ("loss: hinge", "loss: wasserstein")))
    with pytest.raises(SettingsError, match="the Wasserstein loss has no boundary between real and generated"):
        load_study(path)
