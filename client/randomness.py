"""The site's own randomness: a keyed ChaCha20 stream, never torch's or numpy's default generator.

A real site keys it from the operating system, so that noise and sampling cannot be predicted or
repeated. Simulation keys it from a seed, so that a run can be repeated bit for bit; every artefact
of such a run says that it is simulated.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray


class SecureStream:
    """Uniform bits, uniforms, normals and discrete Laplace noise from one 256-bit key.  [RFC 8439]

    Not thread-safe. `fork` gives an independent stream; drawing from one never moves the other.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"a stream key has 32 bytes, got {len(key)}")
        self._key = key
        self._encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    @classmethod
    def from_entropy(cls) -> SecureStream:
        """Keyed by the operating system: for real sites."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def from_seed(cls, seed: int, *labels: str | int) -> SecureStream:
        """Keyed by a public seed: for simulation and tests only."""
        return cls(hashlib.sha256(_encode("simulation", seed, *labels)).digest())

    def fork(self, *labels: str | int) -> SecureStream:
        """An independent stream for one purpose, a pure function of this stream's key and the labels."""
        return SecureStream(hashlib.sha256(self._key + _encode("fork", *labels)).digest())

    def bytes(self, n: int) -> bytes:
        """The next n bytes."""
        return self._encryptor.update(bytes(n))

    def uniform(self, n: int) -> NDArray[np.float64]:
        """(n,) float64 uniform on the open interval (0, 1), 53 bits each."""
        words = np.frombuffer(self.bytes(8 * n), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, n: int) -> NDArray[np.float64]:
        """(n,) float64 standard normal.  [Box and Muller 1958]"""
        half = (n + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniform(half)))
        angle = 2.0 * math.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]

    def bernoulli(self, n: int, probability: float) -> NDArray[np.bool_]:
        """(n,) independent coin flips."""
        return self.uniform(n) < probability

    def discrete_laplace(self, n: int, epsilon: float) -> NDArray[np.int64]:
        """(n,) integers with P(k) proportional to exp(-epsilon |k|).  [Ghosh et al. 2012]

        The difference of two geometric variables with ratio exp(-epsilon).
        """
        a = np.floor(np.log(self.uniform(n)) / -epsilon)
        b = np.floor(np.log(self.uniform(n)) / -epsilon)
        return (a - b).astype(np.int64)

    def integers(self, n: int, low: int, high: int) -> NDArray[np.int64]:
        """(n,) integers in [low, high); bias below 2**-40 for ranges under 2**13."""
        return (low + np.floor(self.uniform(n) * (high - low))).astype(np.int64)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """A random order of range(n)."""
        return np.argsort(self.uniform(n), kind="stable")


def _encode(*labels: str | int) -> bytes:
    """Length-prefixed, so that ("ab", "c") and ("a", "bc") give different keys."""
    parts = [str(label).encode() for label in labels]
    return b"".join(struct.pack("<I", len(p)) + p for p in parts)
