"""Synthetic volumes from a public seed: volume i depends on the seed and on i, on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class LatentToPairs(Protocol):
    """What sampling needs of a generator: (N, latent_size) float32 -> (N, 1+K, D, H, W)."""

    latent_size: int

    def __call__(self, latent: Tensor, /) -> Tensor:
        """Pairs of a batch of latents."""
        ...


def latents(seed: int, first: int, count: int, size: int) -> Tensor:
    """(count, size) float32 standard normal latents number first .. first+count-1.  [Philox: Salmon et al. 2011]"""
    rows = np.empty((count, size), dtype=np.float32)
    for row, index in zip(rows, range(first, first + count), strict=True):
        row[:] = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, index])).standard_normal(size)
    return torch.from_numpy(rows)


def sample_batches(
    generator: LatentToPairs, *, seed: int, first: int, count: int, batch: int = 32, device: str = "cpu"
) -> Iterator[NDArray[np.float32]]:
    """Batches of (<= batch, 1+K, D, H, W) float32 pairs in order, generated one batch at a time."""
    with torch.inference_mode():
        for start in range(first, first + count, batch):
            n = min(batch, first + count - start)
            pairs = generator(latents(seed, start, n, generator.latent_size).to(device))
            yield pairs.float().cpu().numpy()


def sample_pairs(
    generator: LatentToPairs, *, seed: int, first: int, count: int, batch: int = 32, device: str = "cpu"
) -> NDArray[np.float32]:
    """(count, 1+K, D, H, W) float32 pairs. `sample_batches` gives the same as a stream."""
    return np.concatenate(
        list(sample_batches(generator, seed=seed, first=first, count=count, batch=batch, device=device))
    )
