"""Codes: one file each, from integer counts to spikes over time steps; exact for every count of their range.

A code file defines `SPIKES` (the values a spike can have), `SIGNED`, `num_steps(largest) -> int`, `weights(steps) ->
int64 [S]` (what a spike of each step is worth) and `encode(counts, steps) -> int8 [S, ...]`.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..errors import InputError


def encode(code: ModuleType, counts: Tensor, steps: int | None = None) -> Tensor:
    """Spike planes `[S, *counts.shape]`; by default as many steps as the largest count needs.

    Raises `InputError` for counts that are no whole numbers, too large for `steps`, or negative in an unsigned code.
    """
    whole = counts.to(torch.int64)
    if not torch.equal(whole.to(counts.dtype), counts):
        raise InputError("a code takes whole counts")
    if not code.SIGNED and bool((whole < 0).any()):
        raise InputError(f"{code.__name__.rpartition('.')[2]} has no spikes for negative counts")
    needed = code.num_steps(int(whole.abs().max()) if whole.numel() else 0)
    if steps is not None and steps < needed:
        raise InputError(f"these counts need {needed} steps, not {steps}")
    return code.encode(whole, needed if steps is None else steps)


def decode(code: ModuleType, planes: Tensor) -> Tensor:
    """Counts (int64) of spike planes `[S, ...]`: the sum of the spikes times their step's weight."""
    return torch.tensordot(code.weights(len(planes)).to(planes.device), planes.to(torch.int64), dims=1)
