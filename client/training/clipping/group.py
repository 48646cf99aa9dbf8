"""Several devices inside one hospital: each clips its own patients, the sums are added, noise comes once afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def sum_over_group(total: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    """(P,): the clipped sums of every process in the group, added. Each process gets the same bits.

    Every process calls it in every step, also when none of its patients were drawn: the sum is then zero. Noise is
    added to the result, once, by the caller, from one stream that all processes share; noise added before this call
    would be added once a device.
    """
    summed = total.clone()
    distributed.all_reduce(summed, op=torch.distributed.ReduceOp.SUM, group=group)
    return summed
