"""What a model remembers of a sequence: named tensors a layer, as values, in a pool, or in a transformers cache.

All zeros is the valid first state of everything. A `growing` state has an entry a token; other kinds have a fixed size.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from spikingbrain_kernels import Slots
from spikingbrain_kernels.memory import zeros

LayerState = dict[str, Tensor | Slots]


@dataclass(frozen=True)
class StateSpec:
    """One tensor of one sequence's state in one layer; `shape` is without the batch, 0 tokens where it grows.

    `shard_dim`: the dimension of `shape` that tensor parallelism cuts, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Literal["recurrent", "conv", "ring", "growing"]
    shard_dim: int | None = None

    def allocate(self, rows: int, device: torch.device | str, capacity: int = 0) -> Tensor:
        """Zeros `[rows, *shape]`, with room for `capacity` tokens where the state grows."""
        shape = (capacity, *self.shape[1:]) if self.kind == "growing" else self.shape
        return zeros((rows, *shape), self.dtype, device)


def part(state: LayerState, owner: str) -> LayerState:
    """What `owner` remembers: the entries `owner.name`, as `name`."""
    prefix = f"{owner}."
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)} if state else {}


def owned(owner: str, state: LayerState) -> LayerState:
    """The inverse of `part`."""
    return {f"{owner}.{key}": value for key, value in state.items()}


def first_states(specs: list[list[StateSpec]], rows: int, device: torch.device | str) -> list[LayerState]:
    """The states of `rows` sequences before their first token."""
    return [{spec.name: spec.allocate(rows, device) for spec in layer} for layer in specs]


class StatePool:
    """The states of at most `num_slots` sequences, allocated once.

    `capacity`: the most tokens a growing state may hold.
    """

    def __init__(self, specs: list[list[StateSpec]], num_slots: int, device: torch.device | str, capacity: int = 0):
        self._pools = [{s.name: s.allocate(num_slots, device, capacity) for s in layer} for layer in specs]
        self._growing = {
            (layer, s.name) for layer, layer_specs in enumerate(specs) for s in layer_specs if s.kind == "growing"
        }
        self._free = list(reversed(range(num_slots)))
        self.num_slots = num_slots
        tensors = [pool[0] for layer in self._pools for pool in layer.values()]
        self.bytes_per_sequence = sum(tensor.nbytes for tensor in tensors)
        self.bytes_per_token = sum(self._pools[layer][name][0, :1].nbytes for layer, name in self._growing)
        self.capacity = capacity

    @property
    def num_free(self) -> int:
        """Slots that can be allocated."""
        return len(self._free)

    def bytes_used(self, num_tokens: int) -> int:
        """Bytes of state that hold something after `num_tokens` tokens; the same for any number if nothing grows."""
        return self.bytes_per_sequence - self.bytes_per_token * (self.capacity - num_tokens)

    def allocate(self) -> int:
        """A zeroed slot; raises RuntimeError if none is free."""
        if not self._free:
            raise RuntimeError(f"all {self.num_slots} state slots are in use")
        slot = self._free.pop()
        for layer in self._pools:
            for pool in layer.values():
                pool[slot].zero_()
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back."""
        if slot in self._free or not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} is not in use")
        self._free.append(slot)

    def read(self, slot: int, num_tokens: int) -> list[dict[str, Tensor]]:
        """A copy of a slot's state after `num_tokens` tokens; of a growing one, of so many entries."""
        return [
            {
                name: (pool[slot, :num_tokens] if (layer, name) in self._growing else pool[slot]).clone()
                for name, pool in pools.items()
            }
            for layer, pools in enumerate(self._pools)
        ]

    def write(self, slot: int, states: list[dict[str, Tensor]]) -> None:
        """Put what `read` gave, here or in another process, into a fresh slot; raises ValueError if it does not fit."""
        for pools, tensors in zip(self._pools, states, strict=True):
            for name, pool in pools.items():
                target = pool[slot] if tensors[name].shape == pool.shape[1:] else pool[slot, : len(tensors[name])]
                if target.shape != tensors[name].shape:
                    raise ValueError(f"{name} is {tuple(tensors[name].shape)}, the pool has {tuple(pool.shape[1:])}")
                target.copy_(tensors[name])

    def states(self, slots: Tensor) -> list[LayerState]:
        """The states of a batch, a row each of `slots [B]`, to be updated in place; -1 is a padding row."""
        return [{name: Slots(pool, slots) for name, pool in layer.items()} for layer in self._pools]


class StateCache(Cache):
    """A Hugging Face cache over our states: what `generate` passes from step to step.

    `num_tokens [B]` counts each row's real tokens, padding left out; `get_seq_length` counts columns, padding included.
    """

    def __init__(self, specs: list[list[StateSpec]]):
        super().__init__(layers=[])
        self._specs = specs
        self.states: list[dict[str, Any]] = []
        self.reset()

    def begin(self, rows: int, device: torch.device | str) -> None:
        """Make the first states of a batch, unless they are there already."""
        if not self.states:
            self.states = first_states(self._specs, rows, device)
            self.num_tokens = torch.zeros(rows, dtype=torch.long, device=device)

    def advance(self, states: list[LayerState], num_tokens: Tensor | int, columns: int) -> None:
        """Store the states after `num_tokens [B]` more real tokens, in `columns` more columns."""
        self.states = states
        self.num_tokens = self.num_tokens + num_tokens
        self._length += columns

    def reset(self) -> None:
        self.states = []
        self.num_tokens = torch.zeros(0, dtype=torch.long)
        self._length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for layer in self.states for tensor in layer.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        return -1

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        return f"StateCache({len(self)} layers, {len(self.num_tokens)} rows, {self._length} columns)"

    @property
    def batch_size(self) -> int:
        return len(self.num_tokens) if self.states else -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.states)

    @property
    def is_croppable(self) -> bool:
        return False

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = [{name: tensor[indices] for name, tensor in layer.items()} for layer in self.states]
        self.num_tokens = self.num_tokens[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx.to(self.num_tokens.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.num_tokens), device=self.num_tokens.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state cannot forget its last tokens."""
        raise ValueError(f"cannot take back {tokens_to_remove} tokens: a recurrent state has no way back")
