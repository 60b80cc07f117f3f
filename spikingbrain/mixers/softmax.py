"""Softmax attention over everything before: what a Transformer's layer computes; its state grows with the sequence."""

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

from spikingbrain_kernels import Slots, window_attention

from ..state import LayerState, StateSpec
from . import sliding_window


class Mixer(sliding_window.Mixer):
    """Sliding-window attention without an end to the window."""

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """Keys and values of every token."""
        config = self.config
        shape = (0, 2, config.num_key_value_heads, config.head_dim)
        return [StateSpec("keys_values", shape, dtype, "growing", shard_dim=2)]

    def mix(
        self,
        p: dict[str, Tensor],
        state: LayerState,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """`p` of q, k, v -> `[B, T, H * D]`."""
        memory = state.get("keys_values")
        if isinstance(memory, Tensor):
            memory = pad(memory, (0, 0) * 3 + (0, max(0, int(positions.max()) + 1 - memory.shape[1])))
        elif isinstance(memory, Slots) and int(positions.max()) >= memory.pool.shape[1]:
            raise ValueError(f"position {int(positions.max())} is past the {memory.pool.shape[1]} tokens of the pool")
        out, memory = window_attention(
            *self.heads(p, positions),
            window=sys.maxsize,
            positions=positions,
            sinks=self.sinks,
            state=memory,
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        return out.flatten(2), {"keys_values": memory} if state else {}
