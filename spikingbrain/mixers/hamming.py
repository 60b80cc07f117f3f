"""Attention by Hamming similarity of spikes (SpikeVideoFormer, ICML 2025) as a two-state recurrence.

q, k fire where they reach 0; f(q, k) = 1/2 + (2q - 1).(2k - 1) / 2D is the share of channels in which they agree, and
o_t = sum_{i <= t} a^(t-i) f(q_t, k_i) v_i. With S_t = a S_{t-1} + (2 k_t - 1) v_t^T and z_t = a z_{t-1} + v_t that is
o_t = z_t / 2 + (2 q_t - 1) S_t / 2D. The paper drops z, which in causal attention is no constant.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from spikingbrain_kernels import gated_linear, state_dtype

from ..config import SpikingBrainConfig
from ..state import LayerState, StateSpec
from ..surrogates import atan, heaviside
from . import Projection, attention_projections
from .sdsa import DECAY


class Mixer(nn.Module):
    """S and z are one state of D + 1 rows: z belongs to a key channel that is always 1. The output is normalised."""

    kind = "diagonal"
    uses_surrogates = True

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.config = config
        self.g_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """q, k, v, o."""
        return attention_projections(config)

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """S and z of each group of heads."""
        shape = (self.config.num_key_value_heads, self.config.head_dim + 1, self.config.head_dim)
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
        """`p` of q, k, v -> `[B, T, H * D]`."""
        size = self.config.head_dim
        q, k, v = (p[name].unflatten(-1, (-1, size)) for name in ("q_proj", "k_proj", "v_proj"))
        signs = [pad(2 * heaviside(x, atan) - 1, (0, 1), value=1.0) for x in (q, k)]
        # The channel that is always 1 counts D times, so that scale / 2D makes it 1/2.
        query = signs[0] * pad(torch.ones_like(q), (0, 1), value=float(size))
        decay = torch.full_like(k[..., :1], DECAY, dtype=state_dtype(k.dtype)).log()
        out, memory = gated_linear(
            query,
            signs[1],
            v,
            decay,
            scale=1 / (2 * size),
            state=state.get("recurrent"),
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        return self.g_norm(out).flatten(2), {"recurrent": memory} if state else {}

    @staticmethod
    def init_from_attention(
        tensors: dict[str, Tensor],
        config: SpikingBrainConfig,
        generator: torch.Generator,  # noqa: ARG004
    ) -> dict[str, Tensor]:
        """Keep the attention's projections; the norm, one, is new."""
        kept = {name: tensor for name, tensor in tensors.items() if "_norm" not in name}
        return {**kept, "g_norm.weight": torch.ones(config.head_dim, dtype=tensors["k_proj.weight"].dtype)}
