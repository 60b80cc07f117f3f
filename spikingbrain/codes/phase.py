"""Phase: a spike's worth is that of its phase in a period of 8 steps, 2^7, ..., 2, 1, over and over.

Weighted spikes (Kim et al., Neurocomputing 311, 2018), in whole numbers. A count fills one period after the other, each
with at most 255; it has the sign of its spikes.
"""

import torch
from torch import Tensor

SPIKES = (-1, 0, 1)
SIGNED = True
PERIOD = 8
FULL = 2**PERIOD - 1


def num_steps(largest: int) -> int:
    """Whole periods."""
    return PERIOD * -(-largest // FULL)


def weights(steps: int) -> Tensor:
    """128, 64, ..., 1, 128, ..."""
    return 2 ** (PERIOD - 1 - torch.arange(steps) % PERIOD)


def encode(counts: Tensor, steps: int) -> Tensor:
    """Counts of either sign -> planes of -1, 0 and 1; steps after the last whole period are silent."""
    step = torch.arange(steps, device=counts.device).view(-1, *[1] * counts.dim())
    period = step // PERIOD
    part = (counts.abs() - FULL * period).clamp(0, FULL) * (period < steps // PERIOD)
    return (((part >> (PERIOD - 1 - step % PERIOD)) & 1) * counts.sign()).to(torch.int8)
