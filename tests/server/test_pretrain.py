"""The public warm start: repeatable, and its decoder agrees with the standard normal it will be fed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from common.generator.network import PairGenerator
from common.settings.study import Study
from common.telemetry.events import ignore
from server.pretrain import fold_codes, public_phantoms, reconstruction_loss, warm_start


def study(steps: int) -> Study:
    return Study.model_validate(
        {
            "study": "tiny",
            "purpose": "Exercise the public warm start.",
            "family": "wgan",
            "modality": "angio",
            "labels": {1: "vessel"},
            "grid": {"shape": [16, 16, 16], "spacing_mm": [2.0, 2.0, 2.0]},
            "intensity": {"kind": "robust", "low": 1.0, "high": 99.0},
            "privacy": {
                "target_epsilon": 8.0,
                "delta": 1e-3,
                "sampling_probability": 0.5,
                "reference_patients": 10,
                "epsilon_cap": 20.0,
            },
            "training": {
                "rounds": 1,
                "critic_steps_per_round": 1,
                "latent_size": 4,
                "generator_width": 8,
                "critic_width": 2,
                "fake_batch": 4,
            },
            "warm_start": {"phantom": "vessels", "volumes": 16, "steps": steps, "batch": 4},
        }
    )


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    one, two, other = warm_start(study(8), 1, ignore), warm_start(study(8), 1, ignore), warm_start(study(8), 2, ignore)
    assert (one.generator.digest, one.critic.digest) == (two.generator.digest, two.critic.digest)
    assert one.generator.digest != other.generator.digest
    assert one.critic.digest != other.critic.digest


def test_without_steps_both_networks_are_just_initialised() -> None:
    start = warm_start(study(0), 1, ignore)
    assert start.generator.nbytes > 0
    assert start.critic.nbytes > 0


def test_public_phantoms_are_different_individuals() -> None:
    pairs = public_phantoms(study(0), seed=3, count=10).astype(np.float32)
    assert pairs.shape == (10, 2, 16, 16, 16)
    assert len({pair.tobytes() for pair in pairs}) == 10


def test_a_perfect_reconstruction_costs_only_its_code() -> None:
    pairs = torch.zeros(2, 2, 4, 4, 4)
    pairs[:, 1, :2] = 1.0
    code = torch.zeros(2, 3)
    assert reconstruction_loss(pairs, pairs, code, code).item() < 1e-3
    assert reconstruction_loss(pairs.flip(2), pairs, code, code).item() > 1.0


class StatedCodes(nn.Module):
    """An encoder whose codes are read from the first voxels of a pair."""

    def forward(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        mean = pairs[:, 0, 0, 0, :4]
        return mean, torch.full_like(mean, -20.0)


def test_folding_makes_standard_normal_latents_follow_the_codes() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    centre, mixing = rng.normal(size=4), rng.normal(size=(4, 4))
    codes = rng.normal(size=(4000, 4)) @ mixing.T + centre
    pairs = np.zeros((4000, 1, 1, 1, 4), dtype=np.float16)
    pairs[:, 0, 0, 0] = codes
    generator = PairGenerator(shape=(8, 8, 8), labels=1, latent_size=4, width=8)
    weight, bias = generator.stem.weight.detach().clone(), generator.stem.bias.detach().clone()
    fold_codes(generator, StatedCodes(), pairs, batch=500)
    inverse = torch.linalg.pinv(weight)
    shift = inverse @ (generator.stem.bias.detach() - bias)
    spread = inverse @ generator.stem.weight.detach()
    assert np.allclose(shift.numpy(), centre, atol=0.1)
    assert np.allclose((spread @ spread.T).numpy(), mixing @ mixing.T, atol=0.4)
