"""Binary: a count of n is n spikes of 1, as early as possible (SpikingBrain, arXiv 2509.05276, section 3.3)."""

import torch
from torch import Tensor

SPIKES = (0, 1)
SIGNED = False


def num_steps(largest: int) -> int:
    """One step a spike."""
    return largest


def weights(steps: int) -> Tensor:
    """Every spike is worth 1."""
    return torch.ones(steps, dtype=torch.int64)


def encode(counts: Tensor, steps: int) -> Tensor:
    """`counts >= 0` -> planes of 0 and 1."""
    step = torch.arange(steps, device=counts.device).view(-1, *[1] * counts.dim())
    return (counts > step).to(torch.int8)
