import json
import textwrap
from pathlib import Path

import pytest

from common.errors import SettingsError
from common.settings.load import load_study, parse_study, settings_yaml, study_digest, study_json
from common.settings.study import Family, Loss

GOOD = """
study: demo
purpose: Show what a study file looks like
family: wgan
modality: MRA
labels:
  1: vessel
grid:
  shape: [32, 32, 32]
  spacing_mm: [1, 1.0, 1.0]
intensity: {kind: robust, low: 1, high: 99.5}
privacy:
  target_epsilon: 8
  delta: 1e-3
  sampling_probability: 0.25
  reference_patients: 80
  epsilon_cap: 12
training:
  rounds: 3
  critic_steps_per_round: 20
  loss: hinge
warm_start: {phantom: vessels}
"""


def written(folder, text):
    path = folder / "demo.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def problems(folder, *changes, text=GOOD):
    """What is said about the good study after each `old -> new` change."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(SettingsError) as told:
        load_study(written(folder, text))
    return str(told.value).splitlines()


def test_a_good_study_is_read_with_its_defaults(tmp_path):
    study = load_study(written(tmp_path, GOOD))
    assert study.family is Family.WGAN
    assert study.training.loss is Loss.HINGE
    assert study.labels == {1: "vessel"}
    assert study.grid.shape == (32, 32, 32)
    assert study.privacy.delta == 0.001  # YAML 1.1 would read 1e-3 as text
    assert study.audit.false_positive_rate == 0.01


def test_a_misspelt_key_is_told_with_the_nearest_name(tmp_path):
    assert problems(tmp_path, ("target_epsilon", "target_epsilonn")) == [
        "demo.yaml: privacy: key 'target_epsilon' is missing",
        "demo.yaml: privacy: unknown key 'target_epsilonn'; did you mean 'target_epsilon'?",
    ]
    assert problems(tmp_path, ("purpose: Show", "zzz: 1\npurpose: Show")) == ["demo.yaml: unknown key 'zzz'"]


def test_all_problems_are_told_at_once_each_with_its_place(tmp_path):
    told = problems(
        tmp_path,
        ("rounds: 3", "rounds: 0"),
        ("loss: hinge", "loss: hinges\n  width: 3"),
        ("delta: 1e-3", "delta: lots"),
        ("modality: MRA", "modality: [1]"),
    )
    assert [line.split(": ")[1] for line in told] == [
        "modality",
        "privacy.delta",
        "training.loss",
        "training.rounds",
        "training",
    ]
    assert "demo.yaml: training.rounds: input should be greater than or equal to 1, got 0" in told


@pytest.mark.parametrize("value", [".nan", ".inf", "-1", "'8'", "true"])
def test_a_privacy_target_is_a_positive_number(tmp_path, value):
    (line,) = problems(tmp_path, ("target_epsilon: 8", f"target_epsilon: {value}"))
    assert line.startswith("demo.yaml: privacy.target_epsilon: ")


def test_settings_that_contradict_each_other_are_told_together(tmp_path):
    told = problems(
        tmp_path,
        ("[32, 32, 32]", "[32, 30, 256]"),
        ("1: vessel", "0: air\n  2: vessel\n  3: vessel"),
        ("delta: 1e-3", "delta: 0.02"),
        ("epsilon_cap: 12", "epsilon_cap: 7"),
        ("{phantom: vessels}", "{phantom: vessels, volumes: 16, batch: 32}"),
    )
    expected = ["axis j has 30", "axis k has 256", "labels: 0", "'vessel' is used twice", "delta", "epsilon", "batch"]
    assert len(told) == len(expected)
    for line, part in zip(told, expected, strict=True):
        assert part in line


def test_a_model_rule_is_told_without_jargon(tmp_path):
    (line,) = problems(tmp_path, ("high: 99.5", "high: 0.5"))
    assert line == "demo.yaml: intensity: low (1.0) must be below high (0.5)"


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    (line,) = problems(tmp_path, ("delta: 1e-3", "delta: 1e-3\n  delta: 1e-2"))
    assert line.startswith("demo.yaml, line 15, column 3: key 'delta' is given twice")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("study: [demo", "demo.yaml, line 1"),
        ("- a\n- b\n", "`key: value`"),
        ("", "`key: value`"),
        ("study: !!python/object/apply:os.system ['true']\n", "demo.yaml, line 1"),
        ("study: !!binary aGVsbG8=\n", "kind that settings do not have"),
    ],
)
def test_what_is_not_plain_yaml_is_refused(tmp_path, text, part):
    (line,) = problems(tmp_path, text=text)
    assert part in line


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: cannot be read: No such file.*Check the path"):
        load_study(tmp_path / "nowhere.yaml")
    (tmp_path / "demo.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load_study(tmp_path / "demo.yaml")


def test_a_study_survives_json_and_yaml_and_keeps_its_digest(tmp_path):
    study = load_study(written(tmp_path, GOOD))
    assert parse_study(study_json(study)) == study
    again = load_study(written(tmp_path, settings_yaml(study)))
    assert again == study
    assert study_digest(again) == study_digest(study)


def test_the_digest_depends_on_meaning_and_not_on_spelling(tmp_path):
    digest = study_digest(load_study(written(tmp_path, GOOD)))
    assert study_digest(load_study(written(tmp_path, GOOD.replace("1e-3", "0.001").replace("8", "8.0", 1)))) == digest
    assert study_digest(load_study(written(tmp_path, GOOD.replace("rounds: 3", "rounds: 4")))) != digest


def test_a_study_sent_by_a_coordinator_is_checked_like_a_file(tmp_path):
    fields = json.loads(study_json(load_study(written(tmp_path, GOOD))))
    fields["privacy"]["delta"] = 0.09
    with pytest.raises(SettingsError, match=r"study: privacy\.delta"):
        parse_study(json.dumps(fields))
    with pytest.raises(SettingsError, match="study: "):
        parse_study("{not json")


def trgan(text=GOOD):
    return (
        text.replace("family: wgan", "family: trgan")
        .replace("phantom: vessels", "phantom: lesions")
        .replace("loss: hinge", "loss: hinge\n  latent_size: 64")
    )


def test_a_family_that_paints_slices_needs_one_label_a_latent_for_it_and_a_grid_a_lesion_fits(tmp_path):
    assert load_study(written(tmp_path, trgan())).family is Family.TRGAN
    told = problems(
        tmp_path,
        ("  1: vessel", "  1: vessel\n  2: node"),
        ("latent_size: 64", "latent_size: 24"),
        ("[1, 1.0, 1.0]", "[1, 1.0, 3.0]"),
        text=trgan(),
    )
    for line, part in zip(told, ["one label, got 2", "24 is too small", "shortest side is 32 mm"], strict=True):
        assert part in line


def test_the_published_trgan_is_refused_with_a_privacy_target_by_one_clear_problem(tmp_path):
    recipe = (
        "loss: hinge",
        "mode: paper\n  loss: wasserstein\n  critic_steps_per_generator_step: 1",
    )
    (line,) = problems(tmp_path, recipe, text=trgan())
    assert "training.mode: `paper` is TrGAN as published, which has no differential privacy" in line
    assert "target_epsilon: null" in line
    text = trgan().replace(*recipe).replace("target_epsilon: 8", "target_epsilon: null")
    assert load_study(written(tmp_path, text)).training.mode == "paper"


def test_the_published_trgan_is_one_recipe(tmp_path):
    told = problems(
        tmp_path,
        ("target_epsilon: 8", "target_epsilon: null"),
        ("loss: hinge", "mode: paper\n  loss: hinge\n  lipschitz: clamp"),
        text=trgan(),
    )
    for line, key in zip(told, ["loss", "lipschitz", "critic_steps_per_generator_step"], strict=True):
        assert f"training.{key}: `mode: paper` of family trgan has" in line


@pytest.mark.parametrize("name", ["pet-trgan", "pet-trgan-research"])
def test_the_pet_studies_are_valid(name):
    study = load_study(Path(__file__).parents[3] / "deploy/studies" / f"{name}.yaml")
    assert study.family is Family.TRGAN
    assert study.intensity.kind == "window"
