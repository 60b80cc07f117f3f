"""Bitwise, two's complement: spikes of one sign carry counts of both, as the first step is worth -2^(S-1).

The released code sums the first step with a positive sign and puts it right by a side channel.
"""

import torch
from torch import Tensor

SPIKES = (0, 1)
SIGNED = True


def num_steps(largest: int) -> int:
    """A step a binary digit and one for the sign; none where all counts are 0."""
    return largest.bit_length() + 1 if largest else 0


def weights(steps: int) -> Tensor:
    """-2^(S-1), 2^(S-2), ..., 2, 1."""
    place = torch.arange(steps - 1, -1, -1, dtype=torch.int64)
    return torch.where(place == steps - 1, -1, 1) * 2**place


def encode(counts: Tensor, steps: int) -> Tensor:
    """Counts of either sign -> planes of 0 and 1."""
    place = torch.arange(steps - 1, -1, -1, device=counts.device).view(-1, *[1] * counts.dim())
    return ((counts >> place) & 1).to(torch.int8)
