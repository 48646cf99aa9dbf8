"""How a hospital's machine trains: where, how precisely, and how much at once. Never what is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.settings.site import Precision


@dataclass(frozen=True, kw_only=True)
class Compute:
    """device: `cpu` or `cuda`. memory_mib: what a critic's step may hold; a larger draw is worked on in parts."""

    device: str = "cpu"
    precision: Precision = Precision.FLOAT32
    memory_mib: int = 4096

    @property
    def autocast(self) -> torch.dtype | None:
        """The shorter type of forward and input gradients; norms, sums and noise stay float32 or longer."""
        return torch.bfloat16 if self.precision is Precision.BFLOAT16 else None


CPU = Compute()
