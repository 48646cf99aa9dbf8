"""Mid-slices of labelled scans as PNG data URIs. Only synthetic and phantom pairs ever come here."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

ZOOM = 4  # so that a contour is thinner than a voxel
_GAP = 6
LABEL_COLOURS = ((255, 176, 0), (0, 200, 255), (255, 90, 170), (120, 220, 90), (190, 150, 255))


def planes_png(pair: NDArray[np.floating]) -> str:
    """Axial, coronal and sagittal mid-slice side by side, label outlines drawn in: a `data:image/png` URI.

    pair: (1+K, D, H, W), RAS+ axes. Shown as a radiologist looks at it: the patient's right is on the left,
    anterior is up in the axial plane and left in the sagittal one, superior is up.
    """
    tiles = [_tile(plane) for plane in mid_planes(pair)]
    height = max(tile.shape[0] for tile in tiles)
    gap = np.zeros((height, _GAP, 3), dtype=np.uint8)
    row: list[NDArray[np.uint8]] = []
    for tile in tiles:
        below = height - tile.shape[0]
        row += [np.pad(tile, ((below // 2, below - below // 2), (0, 0), (0, 0))), gap]
    return data_uri(np.concatenate(row[:-1], axis=1))


def mid_planes(pair: NDArray[np.floating]) -> tuple[NDArray[np.float32], ...]:
    """The three planes through the middle voxel, each (1+K, rows, columns) in display order."""
    volume = np.asarray(pair, dtype=np.float32)
    i, j, k = (n // 2 for n in volume.shape[1:])
    # Axes run to the right, front and top; rows go down and columns to the viewer's right.
    axial = volume[:, ::-1, ::-1, k].swapaxes(1, 2)
    coronal = volume[:, ::-1, j, ::-1].swapaxes(1, 2)
    sagittal = volume[:, i, ::-1, ::-1].swapaxes(1, 2)
    return axial, coronal, sagittal


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3) uint8 as a PNG data URI without any metadata."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _tile(plane: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(1+K, H, W) -> (ZOOM H, ZOOM W, 3): grey image in [-1, 1], one coloured outline a label."""
    grey = ndimage.zoom(plane[0].clip(-1, 1), ZOOM, order=1, mode="nearest", grid_mode=True)
    pixels = np.repeat(np.rint((grey + 1) * 127.5).astype(np.uint8)[:, :, None], 3, axis=2)
    for label, occupancy in enumerate(plane[1:]):
        inside = ndimage.zoom(occupancy, ZOOM, order=1, mode="nearest", grid_mode=True) > 0.5
        outline = inside & ~ndimage.binary_erosion(inside, border_value=1)
        pixels[outline] = LABEL_COLOURS[label % len(LABEL_COLOURS)]
    return pixels
