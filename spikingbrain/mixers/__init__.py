"""Token mixers: one file each; adding one is adding a file here.

A mixer file defines `class Mixer(nn.Module)` with the parts of `MixerContract`. The projections are built and applied
by the caller (dense, spiking or sharded); the mixer holds only what is left (norms) and never sees hidden states.
"""

from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..state import LayerState, StateSpec

Shard = Literal["heads", "kv_heads", "replicate"]


class Projection(NamedTuple):
    """A linear map `[in] -> [out]`.

    `source`: what it reads: "hidden", a name that `sources` makes, another projection's name, or "mixed" (what `mix`
    returns; at most one projection reads it). `shard`: how tensor parallelism cuts it.
    """

    in_features: int
    out_features: int
    bias: bool = False
    shard: Shard = "heads"
    source: str = "hidden"


class MixerContract(Protocol):
    """What the decoder, conversion, training, the engine and vLLM ask of a mixer, and all they ask.

    A mixer may also have two parts of less common ones:
    `sources(hidden, state, *, cu_seqlens, mask) -> (tensors by name, state)` makes what its projections read besides
    "hidden" (a convolution, a token shift); `finish(p, out) -> out` is applied to what was projected back (a gate).
    Each part returns the states that it changed. Parameters live in submodules that are called, never on the mixer
    itself: sharding and offloading fetch them at the call.

    `shard_dims`: which of its parameters tensor parallelism cuts, and along which dimension; none if it is not there.

    `kind`: how sequence parallelism passes the state on: `diagonal` and `dense` maps compose, `serial` states are
    handed from rank to rank, `attention` exchanges keys.
    """

    kind: ClassVar[Literal["diagonal", "dense", "serial", "attention"]]

    @staticmethod
    def projections(config: Any) -> dict[str, Projection]:
        """Its projections by name, in the order they are applied."""

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """What it remembers; `dtype` is the model's."""

    def mix(
        self,
        p: dict[str, Tensor],
        state: LayerState,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """Projected tensors `[B, T, out]` -> `[B, T, H * V]` and the new state; an empty state: nothing came before.

        `p` also holds what the projections read, "hidden" `[B, T, D]` and what `sources` made. Where none reads
        "mixed", the result is the block's output `[B, T, D]`.
        """

    @staticmethod
    def init_from_attention(tensors: dict[str, Tensor], config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """All tensors of the mixer (projections included) from those of a softmax attention layer, by name."""


def attention_projections(config: Any) -> dict[str, Projection]:
    """q, k, v and o of grouped-query attention, which every mixer made from a Transformer's layer keeps."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": Projection(width, heads, config.qkv_bias),
        "k_proj": Projection(width, groups, config.qkv_bias, "kv_heads"),
        "v_proj": Projection(width, groups, config.qkv_bias, "kv_heads"),
        "o_proj": Projection(heads, width, config.o_bias, source="mixed"),
    }
