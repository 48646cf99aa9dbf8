"""The course of training in a study: optional, and where it is absent the study is what it always was."""

import json

import pytest
from pydantic import ValidationError

from common.settings.load import parse_study, settings_yaml, study_digest, study_json, study_problems
from common.settings.study import CourseSettings
from tests.tiny_studies import tiny_study

# As the version before the course wrote it; a release of that version holds this text, and its digest is signed.
OLD_TEXT = (
    '{"audit":{"attacks":["near_copy","nearest","inversion"],"canaries":0,"confidence":0.95,"epsilon_per_answer":1,'
    '"epsilon_per_question":0.5,"false_positive_rate":0.01,"holdout_fraction":0.35,"inversion_steps":1,'
    '"planted_fraction":0.05,"questions":["label_size","critic"],"volumes":16},"family":"wgan","federation":'
    '{"deadline_s":3600,"minimum_patients":20,"quorum":2,"server_ema":0},"grid":{"shape":[16,16,16],"spacing_mm":'
    '[1,1,1]},"intensity":{"high":99,"kind":"robust","low":1},"labels":{"1":"vessel"},"modality":"angio","privacy":'
    '{"clip_norm":1,"delta":0.001,"epsilon_cap":20,"reference_patients":50,"sampling_probability":0.1,'
    '"target_epsilon":8},"purpose":"tests on the smallest study","release":{"licence":"CC-BY-4.0","max_auc":0.6,'
    '"max_auc_site":0.7,"max_blind_auc":0.55,"max_copied_share":0.06,"max_detectable_copies":0.05,'
    '"max_inference_lift":0.05,"max_tpr":0.06,"unsafe_bypass":false,"valid_days":365,"volumes":4},"study":"tiny",'
    '"training":{"critic_learning_rate":0.0005,"critic_steps_per_generator_step":4,"critic_steps_per_round":5,'
    '"critic_width":2,"fake_batch":4,"generator_ema":0.98,"generator_learning_rate":0.0002,"generator_width":8,'
    '"latent_size":8,"lipschitz":"projection","loss":"wasserstein","mode":"platform","rounds":3,'
    '"views_per_patient":1},"utility":{"epsilon_per_answer":1,"training_steps":300,"volumes":256},"warm_start":'
    '{"batch":4,"phantom":"vessels","steps":0,"volumes":16},"warm_up":null}'
)
OLD_DIGEST = "a957e85a4c902b37a49c19acc32b09af8d59351868d61bbd9e6d5f14397152b6"


def test_a_study_from_before_the_course_keeps_its_text_and_its_digest():
    study = parse_study(OLD_TEXT)
    assert study.course is None
    assert study_json(study) == OLD_TEXT
    assert study_digest(study) == OLD_DIGEST
    assert "course" not in settings_yaml(study)


def test_a_course_is_part_of_the_study_and_of_its_digest():
    study = tiny_study(course={"every_rounds": 2})
    assert json.loads(study_json(study))["course"]["answers"] == "paid"
    assert parse_study(study_json(study)) == study
    assert study_digest(study) != study_digest(tiny_study())
    assert study_digest(study) != study_digest(tiny_study(course={"every_rounds": 1}))


@pytest.mark.parametrize(("every", "rounds", "points"), [(1, 3, (1, 2, 3)), (2, 5, (2, 4)), (3, 3, (3,)), (4, 3, ())])
def test_there_is_a_point_after_every_so_many_rounds(every: int, rounds: int, points: tuple[int, ...]):
    assert CourseSettings(every_rounds=every).rounds(rounds) == points


def test_a_course_that_could_have_no_point_or_no_budget_is_refused_before_anything_is_done():
    assert study_problems(tiny_study(course={"every_rounds": 3})) == []
    (problem,) = study_problems(tiny_study(course={"every_rounds": 4}))
    assert "course.every_rounds: 4 is more than the 3 rounds" in problem
    (problem,) = study_problems(tiny_study(course={"every_rounds": 1, "epsilon_per_answer": 7.0}))
    assert "cost each held-out patient 21, above privacy.epsilon_cap 20" in problem
    exact = {"every_rounds": 1, "epsilon_per_answer": 7.0, "answers": "exact"}
    assert study_problems(tiny_study(course=exact)) == []  # it costs everything; there is nothing to add up


@pytest.mark.parametrize("change", [{"every_rounds": 0}, {"max_auc": 0.5}, {"epsilon_cap": 0.0}, {"answers": "free"}])
def test_a_setting_out_of_its_range_is_refused(change: dict[str, object]):
    with pytest.raises(ValidationError):
        CourseSettings.model_validate({"every_rounds": 1, **change})
