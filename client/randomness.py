"""The site's own randomness: a keyed AES-256-CTR stream, never torch's or numpy's default generator.

A real site keys it from the operating system, so that noise and sampling cannot be predicted or
repeated. Simulation keys it from a seed, so that a run can be repeated bit for bit; every artefact
of such a run says that it is simulated.

The keystream is always made on the processor; on a GPU only the arithmetic that turns its words into
normals runs on the device. Processor and GPU therefore agree up to the last digits of a logarithm or a sine.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterator

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray
from torch import Tensor

from client.gaussian import BoxMuller, normals_on_device

PAIRS_AT_ONCE = 2**14  # what the work needs for them fits a second-level cache
PAIR_BYTES = 16
CIPHER_BLOCK_BYTES = 16  # `update_into` wants room for one more block


class SecureStream:
    """Uniform bits, uniforms, normals and discrete Laplace noise from one 256-bit key.  [NIST SP 800-38A, CTR]

    AES-CTR rather than ChaCha20: both are secure; with the processor's AES instructions it takes 0.6 of the time.
    Not thread-safe. `fork` gives an independent stream; drawing from one never moves the other.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"a stream key has 32 bytes, got {len(key)}")
        self._key = key
        self._encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()

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
        """(n,) float64 uniform on the open interval (0, 1), 52 bits each: with 53 the largest would round to one."""
        words = np.frombuffer(self.bytes(8 * n), dtype="<u8")
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, n: int) -> NDArray[np.float64]:
        """(n,) float64 standard normal."""
        drawn = np.empty(n)
        start = 0
        for block in self.normal_blocks(n, deviation=1.0):
            drawn[start : start + len(block)] = block
            start += len(block)
        return drawn

    def normal_blocks(self, n: int, *, deviation: float) -> Iterator[NDArray[np.float64]]:
        """(m,) float64 normals with this standard deviation, block after block, n in all.

        Each block overwrites the one before, so that the work stays in the processor's cache.
        """
        pairs = max(1, min(PAIRS_AT_ONCE, (n + 1) // 2))
        transform = BoxMuller(pairs)
        for words, count in self._words(n, pairs):
            yield transform.normals(words, deviation)[:count]

    def normal_on(self, device: torch.device, n: int, *, deviation: float) -> Tensor:
        """(n,) float64 normals on a device; the keystream is made on the processor and copied there."""
        pairs = max(1, min(PAIRS_AT_ONCE, (n + 1) // 2))
        blocks = [  # copied first: the next block overwrites the words
            normals_on_device(torch.from_numpy(words.copy()).to(device), deviation)[:count]
            for words, count in self._words(n, pairs)
        ]
        return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.float64, device=device)

    def _words(self, n: int, pairs: int) -> Iterator[tuple[NDArray[np.int64], int]]:
        """The stream as 64-bit words for n normals, `pairs` pairs at a time, with the normals wanted of each."""
        zeros = memoryview(bytes(PAIR_BYTES * pairs))
        stream = np.empty(len(zeros) + CIPHER_BLOCK_BYTES, dtype=np.uint8)
        for start in range(0, n, 2 * pairs):
            count = min(2 * pairs, n - start)
            size = PAIR_BYTES * ((count + 1) // 2)
            self._encryptor.update_into(zeros[:size], stream.data)
            yield stream[:size].view("<i8"), count

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
