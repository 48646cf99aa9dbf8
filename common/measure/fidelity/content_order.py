"""Random subsets without a random generator: rows ordered by a hash of what they hold.

A result that draws pairs, blocks or starting points this way is the same in whatever order the scans came, on every
machine and in every process, and there is no seed that somebody could have chosen.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def content_order(rows: NDArray[np.floating], draw: int = 0) -> NDArray[np.int64]:
    """(N, ...) -> (N,) indices in the order of SHA-256 of each row's bytes, as random as a shuffle.

    draw: another number gives an independent order. Equal rows are interchangeable, so their order does not matter.
    """
    prefix = f"{draw}\0".encode()
    hashes = [hashlib.sha256(prefix + np.ascontiguousarray(row).tobytes()).digest() for row in rows]
    return np.array(sorted(range(len(rows)), key=hashes.__getitem__), dtype=np.int64)
