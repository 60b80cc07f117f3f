"""Softmax attention over a sliding window (SpikingBrain-7B's odd layers): memory bounded by the window."""

import torch
from torch import Tensor, nn

from spikingbrain_kernels import window_attention

from ..config import SpikingBrainConfig
from ..rotary import Rotary
from ..state import LayerState, StateSpec
from . import Projection, attention_projections


def first_sinks(config: SpikingBrainConfig, generator: torch.Generator | None = None) -> Tensor:
    """Sinks before training: small random keys and zero values, which only take a share of the attention."""
    keys = torch.randn(config.num_sinks, config.num_key_value_heads, config.head_dim, generator=generator)
    return torch.stack([config.initializer_range * keys, torch.zeros_like(keys)], dim=1)


class Mixer(nn.Module):
    """Grouped-query attention with rotary positions; each token sees itself and the `window - 1` tokens before it.

    With `num_sinks` S every token also sees the learned `sinks [S, 2, H_kv, D]`, keys (not rotated) and values.
    """

    kind = "attention"
    shard_dims = {"sinks": 2}

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.config = config
        self.head_dim, self.window, self.qk_norm = config.head_dim, config.window, config.qk_norm
        self.rotary = Rotary(config)
        self.sinks = nn.Parameter(first_sinks(config)) if config.num_sinks else None
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """q, k, v, o."""
        return attention_projections(config)

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """A ring of the last `window` keys and values."""
        config = self.config
        shape = (config.window, 2, config.num_key_value_heads, config.head_dim)
        return [StateSpec("ring", shape, dtype, "ring", shard_dim=2)]

    def heads(self, p: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v by head `[B, T, H, D]`, q and k normalised where the model does so, then rotated."""
        q, k, v = (p[name].unflatten(-1, (-1, self.head_dim)) for name in ("q_proj", "k_proj", "v_proj"))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary(positions, q, k)
        return q, k, v

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
        out, ring = window_attention(
            *self.heads(p, positions),
            window=self.window,
            positions=positions,
            sinks=self.sinks,
            state=state.get("ring"),
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        return out.flatten(2), {"ring": ring} if state else {}

    @staticmethod
    def init_from_attention(
        tensors: dict[str, Tensor], config: SpikingBrainConfig, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The tensors of the attention layer; new: the sinks."""
        if not config.num_sinks:
            return tensors
        return {**tensors, "sinks": first_sinks(config, generator).to(tensors["k_proj.weight"].dtype)}
