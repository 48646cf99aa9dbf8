"""The declared feature net of Frechet distance, KID and PRD: a small 3-D encoder trained on public phantoms alone.

No network of photographs fits 3-D scans, and one trained on patients would have to be accounted for. This one is a
pure function of the study, made anew wherever it is needed, and printed with its name and digest: distances of two
different nets cannot be compared. It reads image and labels, because a scan is only useful with its labels in place.

What it learns: from a phantom that was made worse, tell both the anatomy (descriptors of labels and grey values of
the untouched phantom) and what was done to it (noise, blur, contrast, labels out of place).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from common.generator.weights import Weights
from common.phantom.draw import public_phantoms
from common.settings.load import parse_study, study_json
from common.settings.study import Study

FEATURES = 64
VERSION = 1  # of what follows: any change of network, task or training is another net

_SEED = 20_260_060  # public
_PHANTOMS = 384
_STEPS = 300
_BATCH = 16
_LEARNING_RATE = 3e-3
_WIDTH = 16
_CELLS = 2  # per axis, that the last stage is averaged over: features keep a coarse idea of where
_LAYOUT = 3  # per axis, cells whose mean grey value is to be told
_SMALLEST_SHARE = 1e-4  # of the grid: a smaller label counts as this large
_HARM_WEIGHT = 4.0  # of telling what was done: its numbers are smaller than those of anatomy, which have variance one
_LEAST_SPREAD = 0.03  # of the largest deviation
_NOISE, _LOG_GAMMA, _SHIFT = 0.5, 0.5, 0.15  # most that is done: grey values, exponent, share of half the grid


class _Network(nn.Module):
    """pairs (N, 1+K, D, H, W) -> features (N, 64) -> what is to be told (N, T). No norms: they would hide contrast."""

    def __init__(self, labels: int, told: int) -> None:
        super().__init__()
        channels = (1 + labels, _WIDTH, 2 * _WIDTH, 4 * _WIDTH)
        self.stages = nn.ModuleList(
            nn.Conv3d(a, b, kernel_size=3, stride=2, padding=1) for a, b in itertools.pairwise(channels)
        )
        self.features = nn.Linear(channels[-1] * _CELLS**3, FEATURES)
        self.told = nn.Linear(FEATURES, told)

    def encode(self, pairs: Tensor) -> Tensor:
        """(N, 1+K, D, H, W) -> (N, 64)."""
        x = pairs
        for stage in self.stages:
            x = F.silu(stage(x))
        features: Tensor = self.features(F.adaptive_avg_pool3d(x, _CELLS).flatten(1))
        return features

    def forward(self, pairs: Tensor) -> Tensor:
        """(N, 1+K, D, H, W) -> (N, T)."""
        told: Tensor = self.told(F.silu(self.encode(pairs)))
        return told


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """The trained net. centre: (64,), mean of the phantoms' features; whiten: (64, 64), makes their covariance one.

    Without it a few directions in which anatomy varies would hide the many in which only a bad generator does.

    name: of version, phantom and grid. The digest is of the weights: another processor may round differently and
    arrive at another one.
    """

    name: str
    weights: Weights
    centre: NDArray[np.float64]
    whiten: NDArray[np.float64]

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return self.weights.digest

    def __call__(self, pairs: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, 1+K, D, H, W) -> (N, 64): mean zero and covariance one over the phantoms.

        Each scan goes through alone and on one thread, so that its features depend on nothing but itself.
        Raises ValueError for another number of labels.
        """
        expected = self.weights.arrays["stages.0.weight"].shape[1]
        if pairs.ndim != 5 or pairs.shape[1] != expected:
            raise ValueError(f"this encoder reads (N, {expected}, D, H, W), got {pairs.shape}")
        return np.asarray((_encode(self._network, pairs) - self.centre) @ self.whiten)

    @cached_property
    def _network(self) -> _Network:
        arrays = self.weights.arrays
        network = _blank(arrays["stages.0.weight"].shape[1] - 1, len(arrays["told.bias"]))
        network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
        return network.eval()


def study_encoder(study: Study) -> Encoder:
    """The study's encoder. The first call draws phantoms and trains: half a minute for 24 x 32 x 32 voxels."""
    return _study_encoder(study_json(study))


@lru_cache(maxsize=4)  # a campaign asks again at every point of its course
def _study_encoder(text: str) -> Encoder:
    study = parse_study(text)
    phantoms = public_phantoms(study, _SEED, _PHANTOMS).astype(np.float32)
    grid = "x".join(map(str, study.grid.shape))
    name = f"phantom encoder {VERSION}, {study.warm_start.phantom.value} {grid}, {FEATURES} features"
    return train_encoder(phantoms, name=name, steps=_STEPS, seed=_SEED)


def train_encoder(phantoms: NDArray[np.float32], *, name: str, steps: int, seed: int) -> Encoder:
    """An encoder from public pairs (N, 1+K, D, H, W); on one thread, so that a machine always gives the same one.

    Raises ValueError for fewer than two phantoms.
    """
    if len(phantoms) < 2:
        raise ValueError(f"an encoder needs at least two phantoms, got {len(phantoms)}")
    rng = torch.Generator().manual_seed(seed)
    clean = torch.from_numpy(phantoms)
    anatomy = descriptors(clean)
    anatomy = (anatomy - anatomy.mean(dim=0)) / anatomy.std(dim=0).clamp(min=1e-3)
    with _one_thread():
        network = _initialised(phantoms.shape[1] - 1, anatomy.shape[1] + 6, rng)
        optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=1e-3)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            rows = torch.randint(len(clean), (_BATCH,), generator=rng)
            worse, done = worsen(clean[rows], rng)
            told, confessed = network(worse).split([anatomy.shape[1], done.shape[1]], dim=1)
            loss = F.mse_loss(told, anatomy[rows]) + _HARM_WEIGHT * F.mse_loss(confessed, done)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    weights = Weights({key: value.detach().numpy().copy() for key, value in network.state_dict().items()})
    features = _encode(network.eval(), phantoms)
    return Encoder(name=name, weights=weights, centre=features.mean(axis=0), whiten=_whitening(features))


def descriptors(pairs: Tensor) -> Tensor:
    """(N, 1+K, D, H, W) -> (N, 27 + 2 + 7 K + 2 (1+K)): what a phantom is, as numbers.

    Mean grey value of 27 cells; mean slope at full and half resolution; of each label the logarithm of its share of
    the grid, its centre and its spread along each axis, in half grids; of each tissue mean and deviation of grey value.
    """
    image, labels = pairs[:, :1], pairs[:, 1:]
    layout = F.adaptive_avg_pool3d(image, _LAYOUT).flatten(1)
    slopes = torch.stack([_slope(image), _slope(F.avg_pool3d(image, 2))], dim=1)
    size = labels.sum(dim=(2, 3, 4))
    share = (size / labels[0, 0].numel()).clamp(min=_SMALLEST_SHARE).log()
    places = [share]
    for axis, n in zip((2, 3, 4), pairs.shape[2:], strict=True):
        at = torch.linspace(-1.0, 1.0, n)
        along = labels.sum(dim=tuple({2, 3, 4} - {axis}))  # (N, K, n)
        centre = (along @ at) / size.clamp(min=1.0)
        places += [centre, ((along @ at**2) / size.clamp(min=1.0) - centre**2).clamp(min=0).sqrt()]
    tissue = torch.cat([1.0 - labels.sum(dim=1, keepdim=True), labels], dim=1)
    weight = tissue.sum(dim=(2, 3, 4)).clamp(min=1.0)
    mean = (tissue * image).sum(dim=(2, 3, 4)) / weight
    deviation = ((tissue * image**2).sum(dim=(2, 3, 4)) / weight - mean**2).clamp(min=0).sqrt()
    return torch.cat([layout, slopes, *places, mean, deviation], dim=1)


def worsen(pairs: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blur, contrast and noise of the image and labels moved out of place: the pairs, and (N, 6) what was done.

    Done: share of blur, contrast exponent, noise, shift along each axis, each in units of the most that is done. Each
    of blur, noise and the shifts as a whole is left away in half of the pairs.
    """
    n = len(pairs)
    draws = torch.rand(n, 6, generator=rng)
    on = (torch.rand(n, 3, generator=rng) < 0.5).float()
    blur, gamma, noise = draws[:, 0] * on[:, 0], draws[:, 1] * 2 - 1, draws[:, 2] * on[:, 1]
    shift = (draws[:, 3:] * 2 - 1) * on[:, 2:]
    image = pairs[:, :1]
    soft = F.avg_pool3d(F.pad(image, (1,) * 6, mode="replicate"), 3, stride=1)
    image = image + _per_scan(blur) * (soft - image)
    image = ((image.clamp(-1, 1) + 1) / 2) ** torch.exp(_LOG_GAMMA * _per_scan(gamma)) * 2 - 1
    image = image + _NOISE * _per_scan(noise) * (torch.rand(image.shape, generator=rng) * 2 - 1)
    most = torch.tensor([max(_SHIFT * size / 2, 1.0) for size in pairs.shape[2:]])
    steps = (shift * most).round().long()  # whole voxels: interpolating would give a blur away
    labels = torch.stack(
        [pair[1:].roll(tuple(step), (1, 2, 3)) for pair, step in zip(pairs, steps.tolist(), strict=True)]
    )
    done = torch.cat([torch.stack([blur, gamma, noise], dim=1), steps / most], dim=1)
    return torch.cat([image.clamp(-1, 1), labels], dim=1), done


def _slope(image: Tensor) -> Tensor:
    """(N, 1, D, H, W) -> (N,): mean absolute difference of neighbours, over the three axes."""
    return torch.stack([image.diff(dim=axis).abs().mean(dim=(1, 2, 3, 4)) for axis in (2, 3, 4)]).mean(dim=0)


def _per_scan(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1, 1)


def _blank(labels: int, told: int) -> _Network:
    """Torch initialises from the global generator; fork it so that building moves nobody's randomness."""
    with torch.random.fork_rng(devices=[]):
        return _Network(labels, told)


def _initialised(labels: int, told: int, rng: torch.Generator) -> _Network:
    """He initialisation from `rng` alone.  [He et al. 2015]"""
    network = _blank(labels, told)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # both always have one here
    return network


def _encode(network: _Network, pairs: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N, 1+K, D, H, W) -> (N, 64), scan by scan."""
    found = np.empty((len(pairs), FEATURES))
    with _one_thread(), torch.inference_mode():
        for row, pair in zip(found, pairs, strict=True):
            row[:] = network.encode(torch.from_numpy(np.asarray(pair, dtype=np.float32))[None])[0].numpy()
    return found


def _whitening(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, d) -> (d, d) symmetric: covariance to the power of -1/2.  [Kessy et al. 2018, ZCA]

    A direction that phantoms hardly vary along is measured in _LEAST_SPREAD of the largest deviation instead.
    """
    values, vectors = np.linalg.eigh(np.cov(features.T))
    least = max(float(values[-1]) * _LEAST_SPREAD**2, 1e-12)
    return np.asarray((vectors / np.sqrt(values.clip(min=least))) @ vectors.T)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch's number of threads is the caller's again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
