"""Generator weights as named float32 arrays: the only thing that leaves a hospital."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Weights:
    """Named float32 arrays in sorted name order, read-only.

    Raises ValueError for an empty set, another dtype, or a non-finite value.
    """

    arrays: Mapping[str, NDArray[np.float32]]

    def __post_init__(self) -> None:
        if not self.arrays:
            raise ValueError("weights hold no arrays")
        ordered: dict[str, NDArray[np.float32]] = {}
        for name in sorted(self.arrays):
            array = self.arrays[name]
            if array.dtype != np.float32:
                raise ValueError(f"array {name!r} is {array.dtype}, not float32")
            if not np.isfinite(array).all():
                raise ValueError(f"array {name!r} holds a value that is not finite")
            view = np.ascontiguousarray(array).view()
            view.setflags(write=False)
            ordered[name] = view
        object.__setattr__(self, "arrays", MappingProxyType(ordered))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and little-endian values."""
        h = hashlib.sha256()
        for name, array in self.arrays.items():
            h.update(f"{name}\0{array.shape}\0".encode())
            h.update(array.astype("<f4", copy=False).tobytes())
        return h.hexdigest()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: tuple(array.shape) for name, array in self.arrays.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())
