"""Ternary: a count of n is |n| spikes of its sign, as early as possible (arXiv 2509.05276, section 3.3)."""

import torch
from torch import Tensor

from . import binary
from .binary import num_steps, weights

SPIKES = (-1, 0, 1)
SIGNED = True

__all__ = ["SIGNED", "SPIKES", "encode", "num_steps", "weights"]


def encode(counts: Tensor, steps: int) -> Tensor:
    """Counts of either sign -> planes of -1, 0 and 1."""
    return binary.encode(counts.abs(), steps) * counts.sign().to(torch.int8)
