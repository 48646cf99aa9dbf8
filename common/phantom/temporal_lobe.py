"""What lies beside the hippocampus on a T1 crop: white matter, folded cortex, brainstem, fluid.

Coordinates as in `hippocampus`: millimetres, RAS+, left side, x from lateral to medial. Everything is
painted from the depth of the white matter outwards; the hippocampus comes last, in its own module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.phantom.canvas import Canvas, Floats, Vector
from common.phantom.fields import smooth_fields


@dataclass(frozen=True, kw_only=True)
class Tissues:
    """One patient's tissue signals, 0 = air and about 1 = the brightest common tissue."""

    grey: float
    white: float
    fluid: float


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where the hippocampus lies, for what depends on it.

    depth, aside: (I, J, K) mm above and medial of its centre line. outside: (I, J, K) mm to its surface.
    ventricle: widening of the fluid spaces, 1 = average.
    """

    depth: Floats
    aside: Floats
    outside: Floats
    ventricle: float


def paint_temporal_lobe(rng: np.random.Generator, canvas: Canvas, tissues: Tissues, around: Surroundings) -> None:
    """Paint everything but the hippocampus and its temporal horn on `canvas`."""
    folds, creases, broad = smooth_fields(rng, 3, canvas.shape, canvas.spacing_mm, 5.5)
    canvas.signal += np.float32(tissues.white) + np.float32(0.055) * broad
    _paint_deep_grey(rng, canvas, tissues)
    _paint_cortex(canvas, tissues, around, folds, creases)
    _paint_cerebellum(rng, canvas, tissues, folds)
    _paint_insula(rng, canvas, tissues, folds, creases)
    # Amygdala, and in front of it the entorhinal and temporopolar cortex.
    for centre, radii in (((2, 21, -1), (11, 10, 9)), ((6, 26, -8), (13, 9, 11))):
        distance, block = _blob(rng, canvas, centre, radii, 1.5)
        canvas.paint(distance + 2.0 * folds[block], tissues.grey, softness=2.0, block=block)
    _paint_brainstem(rng, canvas, tissues, folds)
    _paint_front_cistern(rng, canvas, tissues, creases)
    _paint_ventricles(rng, canvas, tissues, around)


def _blob(
    rng: np.random.Generator, canvas: Canvas, centre: Vector, radii: Vector, spread_mm: float
) -> tuple[Floats, tuple[slice, slice, slice]]:
    """`Canvas.blob` with a centre and radii that differ from patient to patient."""
    x, y, z = rng.normal(centre, spread_mm)
    a, b, c = np.asarray(radii) * np.exp(rng.normal(0.0, 0.1, 3))
    return canvas.blob((x, y, z), (a, b, c))


def _tube(around: Surroundings, *, aside: float, depth: float, radii: tuple[float, float]) -> Floats:
    """Distance (mm, about) to an elliptical tube that runs along the hippocampus at a fixed offset from it."""
    across, up = (around.aside - aside) * (1 / radii[0]), (around.depth - depth) * (1 / radii[1])
    distance: Floats = (np.sqrt(across * across + up * up) - 1) * float(np.sqrt(radii[0] * radii[1]))
    return distance


def _paint_deep_grey(rng: np.random.Generator, canvas: Canvas, tissues: Tissues) -> None:
    """Putamen, thalamus and midbrain: on T1 between grey and white."""
    for centre, radii, share in (
        ((-6, 15, 15), (5.5, 15, 11), 0.65),
        ((6, 17, 14), (8, 10, 10), 0.38),
        ((10, -9, 11), (12, 11, 10), 0.55),
        ((13, 3, 9), (9, 11, 9), 0.32),
    ):
        distance, block = _blob(rng, canvas, centre, radii, 1.5)
        mixed = tissues.white + (share + rng.normal(0.0, 0.08)) * (tissues.grey - tissues.white)
        canvas.paint(distance, mixed, softness=3.0, block=block)


def _paint_cortex(canvas: Canvas, tissues: Tissues, around: Surroundings, folds: Floats, creases: Floats) -> None:
    """Parahippocampal gyrus, the fluid on its medial side, and the folded cortex below.

    Sulci are the zero crossings of a random field: thin sheets of fluid, flanked by grey, white between them.
    """
    lateral = np.clip(-9 - canvas.x, 0, None)
    floor = around.depth + 6.2 + 0.08 * (canvas.x + 5) + 0.5 * lateral + 1.5 * creases
    sulcus = np.abs(folds) * np.float32(4.0)
    # The gyrus' white core opens towards the lateral white matter, so its grey lies medial of and below it.
    core = _tube(around, aside=5.5, depth=-5.3, radii=(5.4, 2.6))
    rind = _tube(around, aside=6.5, depth=-9.0, radii=(7.6, 6.0))
    # Medial of the gyrus and below the choroid fissure all is fluid, until the brainstem comes.
    canvas.paint(np.maximum(9 - around.aside, around.depth - 1.5 - 1.5 * creases), tissues.fluid + 0.05)
    canvas.paint(np.maximum(sulcus - 4.2, floor), tissues.grey - 0.06, softness=1.5)
    deep = np.maximum(floor + 1.5, 1.0 - core)
    canvas.paint(np.maximum(sulcus - 0.7 - 0.6 * creases + 0.04 * around.depth, deep), tissues.fluid + 0.08)
    medial = np.maximum(6.5 - around.aside, around.depth - 4.5 - creases)
    fissure = np.minimum(rind, around.outside) - np.float32(1.5) - 0.6 * folds
    canvas.paint(np.maximum(fissure, medial), tissues.fluid + 0.05)
    canvas.paint(rind, tissues.grey - 0.05, softness=1.5)
    canvas.paint(core, tissues.white - 0.02, softness=1.5)


def _paint_cerebellum(rng: np.random.Generator, canvas: Canvas, tissues: Tissues, folds: Floats) -> None:
    """Folia behind and below the tentorium: stripes of grey and white two to three millimetres apart."""
    height, slope = rng.normal(-13.0, 1.5), rng.normal(0.25, 0.08)
    top = canvas.z - np.float32(height) + np.float32(slope) * (canvas.y + 20) - 0.15 * canvas.x + folds
    region = np.maximum(top, canvas.y + 4)
    pitch_mm, lean = rng.uniform(2.6, 3.6), rng.uniform(-0.8, 0.8)
    stripes = np.sin((canvas.z + np.float32(lean) * canvas.x) * np.float32(2 * np.pi / pitch_mm))
    canvas.paint(region - 1.2, tissues.fluid + 0.12)
    canvas.paint(region, np.float32(tissues.grey + 0.12) + np.float32(0.16) * stripes)


def _paint_insula(rng: np.random.Generator, canvas: Canvas, tissues: Tissues, folds: Floats, creases: Floats) -> None:
    """Cortex and Sylvian fissure above, lateral and in front."""
    for centre, radii in (((-18, 13, 15), (7, 21, 11)), ((-20, 25, 3), (7, 10, 10))):
        distance, block = _blob(rng, canvas, centre, radii, 1.5)
        wavy = distance + 2.0 * folds[block]
        sulcus = np.abs(creases[block]) * np.float32(4.0)
        canvas.paint(wavy, tissues.grey, softness=1.5, block=block)
        canvas.paint(np.maximum(wavy + 2.0, sulcus - 1.2), tissues.fluid + 0.08, block=block)


def _paint_brainstem(rng: np.random.Generator, canvas: Canvas, tissues: Tissues, folds: Floats) -> None:
    """A white column in a ring of fluid that narrows upwards and melts into the thalamus; fluid behind it."""
    distance, block = _blob(rng, canvas, (17, -15, 3), (7.5, 6, 9), 2.0)
    canvas.paint(distance + 1.5 * folds[block], tissues.fluid + 0.04, block=block)
    distance, block = _blob(rng, canvas, (18.8, 1.5, -9), (10.5, 13.5, 27), 1.2)
    stem: Floats = distance + 0.7 * folds[block]
    closing: Floats = np.maximum(canvas.z[block], 0) * np.float32(0.9)
    width = np.float32(rng.uniform(2.0, 3.8))
    ring: Floats = np.maximum(stem - width + closing, -stem)
    canvas.paint(ring, tissues.fluid + 0.04, block=block)
    canvas.paint(stem + 0.2, tissues.white - 0.03, softness=1.5, block=block)


def _paint_front_cistern(rng: np.random.Generator, canvas: Canvas, tissues: Tissues, creases: Floats) -> None:
    """Fluid in front of the brainstem, and arteries in it, which shine on T1 by inflow."""
    distance, block = _blob(rng, canvas, (17, 23, -8), (8, 8, 11), 1.5)
    canvas.paint(distance + 1.5 * creases[block], tissues.fluid + 0.08, block=block)
    for _ in range(rng.integers(2, 6)):
        centre = rng.normal((14, 18, 0), (3.5, 5.0, 6.0))
        distance, block = canvas.blob((centre[0], centre[1], centre[2]), (1.1, 1.4, 1.1))
        canvas.paint(distance, rng.uniform(0.9, 1.8), block=block)


def _paint_ventricles(rng: np.random.Generator, canvas: Canvas, tissues: Tissues, around: Surroundings) -> None:
    """Fluid of the lateral ventricle behind and above the tail and over the thalamus, and of the third."""
    for centre, radii in (((4, -14, 22), (6, 6, 4)), ((23, -9, 13), (5, 9, 9))):
        distance, block = _blob(rng, canvas, centre, radii, 1.5)
        canvas.paint(distance - np.float32(np.log(around.ventricle)), tissues.fluid + 0.05, block=block)
    distance, block = _blob(rng, canvas, (-3, -25, 14), (5.0, 9.0, 10.0), 1.0)
    wider = distance - np.float32(1.5 * np.log(around.ventricle))
    canvas.paint(np.maximum(wider, -around.outside[block]), tissues.fluid, block=block)
