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
    index: Tensor

    def read(self) -> Tensor:
        """The rows' states `[B, ...]`, a copy."""
        rows = self.pool[self.index.clamp(min=0)]
        padding = (self.index == PADDING).view(-1, *[1] * (rows.dim() - 1))
        return rows.masked_fill(padding, 0)

    def write_(self, rows: Tensor) -> None:
        """Store `rows [B, ...]` into the slots."""
        used = self.index != PADDING
        self.pool[self.index[used]] = rows[used].to(self.pool.dtype)


def make_slots(pool: Tensor, index: list[int]) -> Slots:
    """`Slots` on the pool's own device."""
    return Slots(pool, torch.tensor(index, device=pool.device))
