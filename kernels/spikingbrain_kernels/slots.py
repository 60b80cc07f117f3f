"""Rows of a state pool, addressed by slot: how an engine hands a state to an op that updates it in place."""

from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -1


class Slots(NamedTuple):
    """`pool [num_slots, ...]` and, for each row of a batch, the slot that holds its state (-1: no slot).

    A row without a slot reads a zero state and writes nothing.
    """

    pool: Tensor
    rows: Tensor

    def read(self) -> Tensor:
        """The rows' states `[B, ...]`, a copy."""
        states = self.pool[self.rows.clamp(min=0)]
        padding = (self.rows == PADDING).view(-1, *[1] * (states.dim() - 1))
        return states.masked_fill(padding, 0)

    def write_(self, states: Tensor) -> None:
        """Store `states [B, ...]` into the slots."""
        used = self.rows != PADDING
        self.pool[self.rows[used]] = states[used].to(self.pool.dtype)


def make_slots(pool: Tensor, rows: list[int]) -> Slots:
    """`Slots` on the pool's own device."""
    return Slots(pool, torch.tensor(rows, device=pool.device))
