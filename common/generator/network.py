"""The generator of each family, and its weights as public arrays. The `wgan` family's own network is here too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, assert_never

import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import IntegrityError
from common.evidence.atomic import write_atomic
from common.generator.transversal import PublishedPainter, SlicePainter, TransversalGenerator, code_size
from common.generator.weights import Weights
from common.settings.study import Family, Study


class PairGenerator(nn.Module):
    """Joint generator with two heads: occupancies of the labels, and the image painted on them.

    Every parameter is trained through a noised critic only, so size, depth and number of steps cost
    no privacy. Group normalisation has no running state, so the mean of two sites' weights is a generator.
    Transposed convolutions keep the full-resolution work to a handful of channels, which is what makes a
    step cheap; `channels_last_3d` halves it again on CPU.

    latent (N, L) -> pairs (N, 1+K, D, H, W): image in [-1, 1], K occupancies that with the
    background sum to one.
    """

    FEATURES = 4  # channels of the image head beside the label logits

    def __init__(self, *, shape: Sequence[int], labels: int, latent_size: int, width: int) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.labels = labels
        self.width = width
        self.start = tuple(n // 8 for n in shape)
        self.stem = nn.Linear(latent_size, width * self.start[0] * self.start[1] * self.start[2])
        self.coarse = _Stage(width, width)
        self.middle = _Stage(width, width // 2)
        self.fine = nn.ConvTranspose3d(width // 2, labels + 1 + self.FEATURES, 4, stride=2, padding=1)
        self.paint = nn.Conv3d(self.FEATURES + labels + 1, 1, kernel_size=1)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, latent: Tensor) -> Tensor:
        """(N, L) float32 -> (N, 1+K, D, H, W) float32."""
        x = self.stem(latent).view(len(latent), self.width, *self.start)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = self.fine(self.middle(self.coarse(x)))
        occupancy = x[:, : self.labels + 1].softmax(dim=1)  # channel 0 is background
        image = self.paint(torch.cat([x[:, self.labels + 1 :], occupancy], dim=1)).tanh()
        return torch.cat([image, occupancy[:, 1:]], dim=1)


class _Stage(nn.Module):
    """Twice the resolution: transposed convolution, group normalisation, leaky ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose3d(channels_in, channels_out, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Cin, d, h, w) -> (N, Cout, 2d, 2h, 2w)."""
        return F.leaky_relu(self.norm(self.convolution(x)), 0.2)


StudyGenerator: TypeAlias = PairGenerator | TransversalGenerator


def build_generator(study: Study, seed: int = 0) -> StudyGenerator:
    """The study's generator with weights drawn from a public seed."""
    training, shape = study.training, study.grid.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match study.family:
            case Family.WGAN:
                return PairGenerator(
                    shape=shape,
                    labels=len(study.labels),
                    latent_size=training.latent_size,
                    width=training.generator_width,
                )
            case Family.TRGAN:
                painter = PublishedPainter if training.mode == "paper" else SlicePainter
                return TransversalGenerator(
                    grid=study.grid.as_grid(),
                    latent_size=training.latent_size,
                    painter=painter(
                        shape=shape, code_size=code_size(training.latent_size), width=training.generator_width
                    ),
                )
            case _:
                assert_never(study.family)


def weights_of(module: nn.Module) -> Weights:
    """A copy of the module's parameters as public arrays."""
    return Weights({name: p.detach().cpu().float().numpy().copy() for name, p in module.named_parameters()})


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Overwrite the module's parameters. Raises ValueError when names or shapes differ."""
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if expected != weights.shapes:
        odd = sorted(set(expected.items()) ^ set(weights.shapes.items()))
        raise ValueError(f"weights do not fit the network; first difference: {odd[0]}")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(weights.arrays[name].copy()))


def save_weights(path: Path, weights: Weights) -> None:
    """Write weights as safetensors, whole or not at all."""
    write_atomic(path, save(dict(weights.arrays), metadata={"digest": weights.digest}))


def read_weights(path: Path) -> Weights:
    """Read weights. Raises IntegrityError when the file is damaged or its digest does not hold."""
    data = path.read_bytes()
    try:
        weights = Weights(load(data))
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    except (SafetensorError, ValueError) as error:
        raise IntegrityError(
            f"{path.name} is damaged ({len(data)} bytes, not readable as weights); nothing was loaded from it. "
            "Restore the file or delete it to fall back to the previous round."
        ) from error
    if weights.digest.encode() not in header:
        raise IntegrityError(
            f"{path.name} does not match its own digest; nothing was loaded from it. "
            "Restore the file or delete it to fall back to the previous round."
        )
    return weights


def generator_from(study: Study, weights: Weights, device: str = "cpu") -> StudyGenerator:
    """The study's generator holding `weights`, in evaluation mode on `device`."""
    generator = build_generator(study)
    load_weights(generator, weights)
    return generator.to(device).eval()
