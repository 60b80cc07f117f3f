"""States that live elsewhere: rows of a pool that an op updates in place, or states that are on other ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

PADDING = -1


class Carrier(ABC):
    """A state that decides itself how an op is run with it: what sequence parallelism hands to ops as their state."""

    @abstractmethod
    def carry(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The output of `op(*args, state=..., **kwargs)` with the state this stands for, and the new state."""


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


def to_update(state: Tensor | Slots) -> tuple[Tensor | Slots, Tensor, Tensor | None]:
    """What to return as new state, the pool to write to, and the documents' slots in it (None: 0, 1, 2, ...)."""
    if isinstance(state, Slots):
        return state, state.pool, state.rows
    state = state.clone(memory_format=torch.contiguous_format)
    return state, state, None
