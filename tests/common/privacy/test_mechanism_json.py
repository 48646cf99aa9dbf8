import pytest

from common.errors import IntegrityError
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, NoisedCounts, Unit
from common.privacy.mechanism_json import mechanism_json, parse_mechanism


@pytest.mark.parametrize(
    "mechanism",
    [
        DpSgd(noise_multiplier=0.1 + 0.2, sampling_probability=1 / 3, steps=7),
        DpSgd(noise_multiplier=1, sampling_probability=1, steps=0, unit=Unit.PATCH),
        GaussianRelease(noise_multiplier=1 / 3),
        GaussianRelease(noise_multiplier=0),
        NoisedCounts(epsilon=1e-300),
        ExactAnswer(question="dice of a segmenter trained on members"),
    ],
)
def test_a_mechanism_is_read_back_to_the_last_bit(mechanism):
    assert parse_mechanism(mechanism_json(mechanism)) == mechanism


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind": "laplace"}',
        '{"kind": "noised_counts"}',
        '{"kind": "gaussian_release"}',
        '{"kind": "gaussian_release", "noise_multiplier": -1}',
        '{"kind": "gaussian_release", "noise_multiplier": 1.0, "steps": 2}',
        '{"kind": "noised_counts", "epsilon": -1}',
        '{"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_probability": 0.1, "steps": 1, "unit": "slice"}',
    ],
)
def test_anything_else_is_damage_and_never_free(text):
    with pytest.raises(IntegrityError):
        parse_mechanism(text)
