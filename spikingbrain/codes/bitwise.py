"""Bitwise, sign and magnitude: the binary digits of |n|, largest first, with n's sign (arXiv 2509.05276, eq. 22)."""

import torch
from torch import Tensor

SPIKES = (-1, 0, 1)
SIGNED = True


def num_steps(largest: int) -> int:
    """One step a binary digit."""
    return largest.bit_length()


def weights(steps: int) -> Tensor:
    """2^(S-1), ..., 2, 1."""
    return 2 ** torch.arange(steps - 1, -1, -1, dtype=torch.int64)


def encode(counts: Tensor, steps: int) -> Tensor:
    """Counts of either sign -> planes of -1, 0 and 1."""
    place = torch.arange(steps - 1, -1, -1, device=counts.device).view(-1, *[1] * counts.dim())
    return (((counts.abs() >> place) & 1) * counts.sign()).to(torch.int8)
