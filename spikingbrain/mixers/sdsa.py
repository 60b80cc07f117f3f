"""Spike-driven self-attention (Spike-driven Transformer, NeurIPS 2023) as a causal running sum.

q, k and v fire where they reach 0. For each channel S_t = a S_{t-1} + k_t v_t and o_t = q_t [S_t >= theta]: a sum of
coincidences, gated; nothing is multiplied but spikes. The paper sums over all tokens; a decay keeps S bounded.
"""

import torch
from torch import Tensor, nn

from spikingbrain_kernels import gated_linear, state_dtype

from ..config import SpikingBrainConfig
from ..state import LayerState, StateSpec
from ..surrogates import atan, heaviside
from . import Projection, attention_projections

# Half-lives of 16 tokens, and the sum that makes a channel fire: about that of independent spikes of rate 1/2.
DECAY = 0.9576
THETA = 0.25 / (1 - DECAY)


class Mixer(nn.Module):
    """Learned: the threshold of each head's channels, `theta [D]`. One state of D values a head."""

    kind = "diagonal"
    uses_surrogates = True

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.config = config
        self.theta = nn.Parameter(torch.full((config.head_dim,), THETA))

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """q, k, v, o."""
        return attention_projections(config)

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """A running sum for each channel of each group of heads."""
        shape = (self.config.num_key_value_heads, 1, self.config.head_dim)
        return [StateSpec("recurrent", shape, state_dtype(dtype), "recurrent", shard_dim=0)]

    def mix(
        self,
        p: dict[str, Tensor],
        state: LayerState,
        *,
        positions: Tensor,  # noqa: ARG002
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """`p` of q, k, v -> `[B, T, H * D]`, zeros and ones."""
        heads = (-1, self.config.head_dim)
        q, k, v = (heaviside(p[name].unflatten(-1, heads), atan) for name in ("q_proj", "k_proj", "v_proj"))
        one = torch.ones_like(k[..., :1])
        decay = torch.full_like(one, DECAY, dtype=state_dtype(k.dtype)).log()
        sums, memory = gated_linear(
            one, one, k * v, decay, scale=1.0, state=state.get("recurrent"), cu_seqlens=cu_seqlens, mask=mask
        )
        fires = heaviside(sums - self.theta.to(sums.dtype), atan).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        return (q * fires).flatten(2), {"recurrent": memory} if state else {}

    @staticmethod
    def init_from_attention(
        tensors: dict[str, Tensor],
        config: SpikingBrainConfig,
        generator: torch.Generator,  # noqa: ARG004
    ) -> dict[str, Tensor]:
        """Keep the attention's projections; the threshold is new."""
        like = tensors["k_proj.weight"]
        kept = {name: tensor for name, tensor in tensors.items() if "_norm" not in name}
        return {**kept, "theta": torch.full((config.head_dim,), THETA, dtype=like.dtype)}
