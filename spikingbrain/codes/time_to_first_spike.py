"""Time to first spike: a count of n is one spike of its sign, the earlier the larger |n|; 0 never fires.

With S steps a spike at step t (from 0) is worth S - t (temporal coding: Thorpe et al., 2001; Rueckauer & Liu, 2018).
"""

import torch
from torch import Tensor

SPIKES = (-1, 0, 1)
SIGNED = True


def num_steps(largest: int) -> int:
    """One step a value."""
    return largest


def weights(steps: int) -> Tensor:
    """S, S - 1, ..., 1."""
    return torch.arange(steps, 0, -1, dtype=torch.int64)


def encode(counts: Tensor, steps: int) -> Tensor:
    """Counts of either sign -> planes of -1, 0 and 1, at most one spike a channel."""
    worth = weights(steps).to(counts.device).view(-1, *[1] * counts.dim())
    return ((counts.abs() == worth) * counts.sign()).to(torch.int8)
