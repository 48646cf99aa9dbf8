"""Public seeds of a campaign, one per purpose, so that no two purposes ever share random numbers."""

from __future__ import annotations

import hashlib


def derive(seed: int, *labels: str | int) -> int:
    """48 bits that depend on the campaign's seed and the purpose; exact in JSON and YAML.

    Without it the phantoms of a simulated hospital would be the very phantoms of the public warm start.
    """
    text = "\0".join(["consilium", str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
