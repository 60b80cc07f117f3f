"""Bitwise without a sign: the binary digits of n >= 0, largest first (SpikingBrain, arXiv 2509.05276, section 3.3)."""

from torch import Tensor

from . import bitwise
from .bitwise import num_steps, weights

SPIKES = (0, 1)
SIGNED = False

__all__ = ["SIGNED", "SPIKES", "encode", "num_steps", "weights"]


def encode(counts: Tensor, steps: int) -> Tensor:
    """`counts >= 0` -> planes of 0 and 1."""
    return bitwise.encode(counts, steps)
