"""The generator, its weights as public arrays, and volumes from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import IntegrityError
from common.generator.network import PairGenerator, load_weights, read_weights, save_weights, weights_of
from common.generator.sampling import latents, sample_pairs
from common.generator.weights import Weights


def tiny(shape: tuple[int, int, int] = (16, 16, 16), labels: int = 2) -> PairGenerator:
    torch.manual_seed(0)
    return PairGenerator(shape=shape, labels=labels, latent_size=6, width=8)


@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 32, 32), (48, 48, 48), (64, 64, 64), (32, 16, 24)])
def test_pairs_have_the_studys_shape_and_ranges(shape: tuple[int, int, int]) -> None:
    pairs = sample_pairs(tiny(shape), seed=1, first=0, count=2)
    assert pairs.shape == (2, 3, *shape)
    assert np.abs(pairs[:, 0]).max() <= 1
    assert pairs[:, 1:].min() >= 0
    assert pairs[:, 1:].sum(axis=1).max() <= 1 + 1e-6


def test_a_volume_depends_on_its_seed_and_number_only() -> None:
    generator = tiny()
    whole = sample_pairs(generator, seed=9, first=0, count=5, batch=4)
    part = sample_pairs(generator, seed=9, first=3, count=2, batch=1)
    assert np.allclose(whole[3:], part, atol=1e-5)
    assert not np.allclose(whole[0], whole[1])
    assert not torch.equal(latents(1, 0, 2, 4), latents(2, 0, 2, 4))


def test_weights_survive_the_disk_and_their_digest_names_their_values(tmp_path: Path) -> None:
    weights = weights_of(tiny())
    save_weights(tmp_path / "g.safetensors", weights)
    back = read_weights(tmp_path / "g.safetensors")
    assert back.digest == weights.digest
    other = {n: a.copy() for n, a in weights.arrays.items()}
    next(iter(other.values())).flat[0] += 1e-3
    assert Weights(other).digest != weights.digest
    generator = tiny()
    load_weights(generator, Weights(other))
    assert weights_of(generator).digest == Weights(other).digest


def test_a_truncated_or_edited_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    save_weights(path, weights_of(tiny()))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match="damaged"):
        read_weights(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="its own digest"):
        read_weights(path)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(tiny(labels=1), weights_of(tiny(labels=2)))


def test_weights_refuse_what_may_not_leave() -> None:
    with pytest.raises(ValueError, match="not float32"):
        Weights({"a": np.zeros(2)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="not finite"):
        Weights({"a": np.array([np.nan], dtype=np.float32)})
    with pytest.raises(ValueError, match="no arrays"):
        Weights({})
