"""Gated linear attention as SpikingBrain-7B and 76B have it (arXiv 2509.05276, section 2; GLA, 2312.06635)."""

import torch
from torch import Tensor, nn

from spikingbrain_kernels import gated_linear, log_sigmoid, state_dtype

from ..config import SpikingBrainConfig
from ..errors import InputError
from ..state import LayerState, StateSpec
from . import Projection, attention_projections

FEATURE_MAPS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "silu": nn.functional.silu, "identity": lambda x: x}
# The released 7B's initialisation of the gate: decay sigmoid(0)^(1/16) a token, a half-life of 16 tokens.
GATE_GAIN = 2**-2.5


class Mixer(nn.Module):
    """S_t = diag(a_t) S_{t-1} + k_t^T v_t, o_t = norm(q_t S_t / sqrt(K)); a_t = sigmoid(gate(x_t))^(1/normalizer).

    With a tied gate a_t = 1 - k_t, where k_t = sigmoid(k_proj(x_t)) (the 76B; as in MetaLA, arXiv 2411.10741).

    q and k pass a feature map; no positions, no denominator: the norm over each head takes its place. One state for
    each group of heads that share k, v and decay.
    """

    kind = "diagonal"

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        if config.gate["feature_map"] not in FEATURE_MAPS:
            raise InputError(
                f"unknown gate.feature_map {config.gate['feature_map']!r}; choose from {', '.join(FEATURE_MAPS)}"
            )
        self.config = config
        self.head_dim, self.gate = config.head_dim, dict(config.gate)
        self.feature_map = FEATURE_MAPS[config.gate["feature_map"]]
        self.g_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """q, k, v, o and, unless it is tied, the gate: one dense projection, or two of low rank."""
        width, rank = config.hidden_size, config.gate["rank"]
        groups = config.num_key_value_heads * config.head_dim
        if config.gate["tied"]:
            gate = {}
        elif rank is None:
            gate = {"gate_proj": Projection(width, groups, True, "kv_heads")}
        else:
            gate = {
                "gate_down": Projection(width, rank, False, "replicate"),
                "gate_proj": Projection(rank, groups, True, "kv_heads", source="gate_down"),
            }
        return {**attention_projections(config), **gate}

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """One matrix a group of heads."""
        head = self.config.head_dim
        shape = (self.config.num_key_value_heads, head, head)
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
        """`p` of q, k, v and gate -> `[B, T, H * D]`."""
        q, k, v = (p[name].unflatten(-1, (-1, self.head_dim)) for name in ("q_proj", "k_proj", "v_proj"))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        # log(1 - sigmoid(k)) = log sigmoid(-k).
        gate = -k if self.gate["tied"] else p["gate_proj"].unflatten(-1, (-1, self.head_dim))
        out, memory = gated_linear(
            self.feature_map(q),
            self.feature_map(k),
            v,
            log_sigmoid(gate, self.gate["normalizer"]),
            scale=self.head_dim**-0.5,
            state=state.get("recurrent"),
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        return self.g_norm(out).flatten(2), {"recurrent": memory} if state else {}

    @staticmethod
    def init_from_attention(
        tensors: dict[str, Tensor], config: SpikingBrainConfig, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Keep the attention's tensors; new: the gate, small, and the norm, one."""
        like = tensors["k_proj.weight"]
        new = {"g_norm.weight": torch.ones(config.head_dim, dtype=like.dtype)}
        for name, projection in Mixer.projections(config).items():
            if not name.startswith("gate"):
                continue
            weight = torch.empty(projection.out_features, projection.in_features)
            nn.init.xavier_uniform_(weight, gain=GATE_GAIN, generator=generator)
            new[f"{name}.weight"] = weight.to(like.dtype)
            if projection.bias:
                new[f"{name}.bias"] = torch.zeros(projection.out_features, dtype=like.dtype)
        return {**tensors, **new}
