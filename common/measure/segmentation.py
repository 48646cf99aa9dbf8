"""A small U-Net that measures how useful labelled scans are: train on some, test Dice on others.

"Train on synthetic, test on real" needs a segmenter that carries over between sources of scans.
Its augmentation therefore covers what differs between phantoms, synthetic and real scans: pose and
size of the structure, contrast, bias field, sharpness and noise. Left and right are never swapped,
because labels may depend on the side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from common.generator.weights import Weights
from common.telemetry.events import Observer, Progress, ignore

CHANNELS = (16, 32, 64)
STRIDES = (2, 2)
BATCH = 4
LEARNING_RATE = 1e-2
BLOCK = 16  # scans segmented at once: bounds memory, changes no result

# Ranges of the augmentation: half-widths of uniform draws around "unchanged". Chosen on hippocampus scans:
# twice as wide costs about 0.01 of Dice, both from real and from phantom training scans.
ROTATION_RAD = 0.15  # about 9 degrees, about each axis
LOG_ZOOM = 0.1
SHIFT = 0.06  # fraction of half the grid
LOG_GAMMA = 0.3
LOG_CONTRAST = 0.2
BRIGHTNESS = 0.1
BIAS = 0.15
NOISE = 0.1


def build_segmenter(labels: int) -> nn.Module:
    """The U-Net: (N, 1, D, H, W) image in [-1, 1] -> (N, 1 + labels, D, H, W) logits, background first.

    Each axis of the grid must be even. Instance norm, no running statistics: nothing of the
    training set is kept but the weights.
    """
    if labels < 1:
        raise ValueError(f"a segmenter needs at least one foreground label, got {labels}")
    # The library initialises from the global generator; fork it so that building moves nobody's randomness.
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=1 + labels,
            channels=CHANNELS,
            strides=STRIDES,
            norm="INSTANCE",
        )
    return network


def train_segmenter(
    pairs: NDArray[np.floating],
    *,
    labels: int,
    steps: int,
    seed: int,
    device: str = "cpu",
    observer: Observer = ignore,
) -> Weights:
    """Train a segmenter on labelled pairs; the same arguments give the same weights on the same machine.

    pairs: (N, 1 + labels, D, H, W), image in [-1, 1] and occupancies of the foreground labels.
    steps: optimiser steps of BATCH scans each; the learning rate falls to zero along a cosine.
    Raises ValueError for pairs of another shape, none at all, or a negative number of steps.
    """
    _check_pairs(pairs, labels)
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    rng = torch.Generator().manual_seed(seed)
    network = build_segmenter(labels)
    _initialise(network, rng)
    network.to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    loss_of = DiceCELoss(softmax=True, include_background=False, batch=True)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(pairs), (BATCH,), generator=rng)
        batch = torch.from_numpy(np.asarray(pairs[rows.numpy()], dtype=np.float32))
        image, target = _augment(batch, rng)
        loss = loss_of(network(image.to(device)), target.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        observer(Progress(task="segmenter", done=step + 1, total=steps))
    return Weights({name: _to_numpy(value) for name, value in network.state_dict().items()})


def segment(weights: Weights, images: NDArray[np.floating], *, labels: int, device: str = "cpu") -> NDArray[np.uint8]:
    """Label every voxel: (N, D, H, W) images in [-1, 1] -> (N, D, H, W), 0 is background, k the k-th label.

    Raises ValueError when the weights are not those of a segmenter for `labels` labels.
    """
    network = load_segmenter(weights, labels).to(device)
    out = np.zeros(images.shape, dtype=np.uint8)
    with torch.inference_mode():
        for first in range(0, len(images), BLOCK):
            block = np.asarray(images[first : first + BLOCK], dtype=np.float32)
            logits = network(torch.from_numpy(block)[:, None].to(device))
            out[first : first + BLOCK] = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
    return out


def dice_per_patient(
    weights: Weights, pairs: NDArray[np.floating], *, labels: int, device: str = "cpu"
) -> NDArray[np.float64]:
    """Dice of the segmenter on every scan: (n, labels) in [0, 1], one row a scan.

    Where neither the truth nor the segmentation holds a label, Dice is 1.
    """
    _check_pairs(pairs, labels)
    found = segment(weights, pairs[:, 0], labels=labels, device=device)
    return dice(found, labels_of(pairs), labels=labels)


def dice(found: NDArray[np.uint8], truth: NDArray[np.uint8], *, labels: int) -> NDArray[np.float64]:
    """Overlap 2|A and B| / (|A| + |B|) per scan and foreground label.  [Dice 1945]

    found, truth: (n, D, H, W). Returns (n, labels); both empty gives 1.
    """
    out = np.ones((len(found), labels), dtype=np.float64)
    for k in range(1, labels + 1):
        a = (found == k).reshape(len(found), -1)
        b = (truth == k).reshape(len(truth), -1)
        total = a.sum(axis=1) + b.sum(axis=1)
        some = total > 0
        out[some, k - 1] = 2.0 * (a & b).sum(axis=1)[some] / total[some]
    return out


def labels_of(pairs: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(N, 1 + K, D, H, W) pairs -> (N, D, H, W) most likely label; background is what the occupancies leave over."""
    occupancy = np.asarray(pairs[:, 1:], dtype=np.float32)
    background = 1.0 - occupancy.sum(axis=1, keepdims=True)
    most: NDArray[np.uint8] = np.concatenate([background, occupancy], axis=1).argmax(axis=1).astype(np.uint8)
    return most


def load_segmenter(weights: Weights, labels: int) -> nn.Module:
    """A segmenter in evaluation mode with these weights.

    Raises ValueError when names or shapes are not those of a segmenter for `labels` labels.
    """
    network = build_segmenter(labels)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if weights.shapes != expected:
        raise ValueError(f"these are not the weights of a segmenter for {labels} labels")
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.arrays.items()})
    return network.eval()


def _check_pairs(pairs: NDArray[np.floating], labels: int) -> None:
    if pairs.ndim != 5 or pairs.shape[1] != 1 + labels or len(pairs) == 0:
        raise ValueError(f"pairs must be (N >= 1, {1 + labels}, D, H, W) for {labels} labels, got {pairs.shape}")


def _to_numpy(value: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = value.detach().to("cpu", torch.float32).numpy()
    return array


def _initialise(network: nn.Module, rng: torch.Generator) -> None:
    """He initialisation from `rng` alone.  [He et al. 2015]"""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _augment(batch: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random view of each pair: (B, 1 + K, D, H, W) -> image (B, 1, D, H, W), one-hot (B, 1 + K, D, H, W)."""
    moved = _move(batch, rng)
    occupancy = moved[:, 1:]
    soft = torch.cat([1.0 - occupancy.sum(dim=1, keepdim=True), occupancy], dim=1)
    target = functional.one_hot(soft.argmax(dim=1), soft.shape[1]).movedim(-1, 1).float()
    return _relight(moved[:, :1], rng), target


def _move(batch: Tensor, rng: torch.Generator) -> Tensor:
    """Turn, zoom and shift each pair at random; beyond the edge the image is its border, the labels are empty."""
    n = len(batch)
    turn = _around(n, 3, ROTATION_RAD, rng)
    zoom = torch.exp(_around(n, 3, LOG_ZOOM, rng))
    matrix = torch.matrix_exp(_skew(turn)) * zoom[:, None, :]
    theta = torch.cat([matrix, _around(n, 3, SHIFT, rng)[:, :, None]], dim=2)
    grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
    image = functional.grid_sample(batch[:, :1], grid, padding_mode="border", align_corners=False)
    occupancy = functional.grid_sample(batch[:, 1:], grid, padding_mode="zeros", align_corners=False)
    return torch.cat([image, occupancy], dim=1)


def _skew(turn: Tensor) -> Tensor:
    """(B, 3) rotation vectors -> (B, 3, 3) skew matrices, whose exponential is the rotation."""
    x, y, z = turn.unbind(dim=1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).reshape(-1, 3, 3)


def _relight(image: Tensor, rng: torch.Generator) -> Tensor:
    """Change contrast, bias field, sharpness and noise of each image at random; stays in [-1, 1]."""
    n = len(image)
    gamma = torch.exp(_around(n, 1, LOG_GAMMA, rng)).reshape(n, 1, 1, 1, 1)
    curved = ((image.clamp(-1, 1) + 1) / 2) ** gamma * 2 - 1
    blurred = functional.avg_pool3d(functional.pad(curved, (1,) * 6, mode="replicate"), 3, stride=1)
    mix = (torch.rand(n, 1, 1, 1, 1, generator=rng) * 2 - 1).clamp(min=0)  # half of the scans stay as sharp as they are
    soft = curved + mix * (blurred - curved)
    coarse = (torch.rand(n, 1, 3, 3, 3, generator=rng) * 2 - 1) * BIAS
    field = functional.interpolate(coarse, size=image.shape[2:], mode="trilinear", align_corners=True)
    contrast = torch.exp(_around(n, 1, LOG_CONTRAST, rng)).reshape(n, 1, 1, 1, 1)
    brightness = _around(n, 1, BRIGHTNESS, rng).reshape(n, 1, 1, 1, 1)
    level = torch.rand(n, 1, 1, 1, 1, generator=rng) * NOISE
    noise = torch.randn(image.shape, generator=rng) * level
    return (soft * contrast * (1 + field) + brightness + noise).clamp(-1, 1)


def _around(n: int, columns: int, half_width: float, rng: torch.Generator) -> Tensor:
    """(n, columns) uniform on [-half_width, half_width]."""
    return (torch.rand(n, columns, generator=rng) * 2 - 1) * half_width
