"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464): a key's value is replaced, not added to."""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, silu

from spikingbrain_kernels import gated_delta, state_dtype

from ..config import SpikingBrainConfig
from ..convolution import ShortConvolution
from ..state import LayerState, StateSpec
from . import Projection, attention_projections

# silu(SILU_ONE) = 1: an output gate that starts open.
SILU_ONE = 1.2784645


class Mixer(nn.Module):
    """S' = a_t S_{t-1}, S_t = S' + b_t k_t^T (v_t - k_t S'), o_t = norm(q_t S_t / sqrt(K)) * silu(g_t).

    q, k and v pass a short convolution and SiLU; q and k have length one. a_t = sigmoid(decay)^(1/normalizer) and
    b_t = sigmoid(beta), one number a head of k and v. No positions.
    """

    kind = "dense"
    shard_dims = {"conv.q.weight": 0, "conv.k.weight": 0, "conv.v.weight": 0}

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.config = config
        widths = {name: attention_projections(config)[f"{name}_proj"].out_features for name in "qkv"}
        self.conv = nn.ModuleDict({name: ShortConvolution(width, config.conv_size) for name, width in widths.items()})
        self.g_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """q, k, v, o; write strength, decay and the output's gate."""
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        return {
            **attention_projections(config),
            "beta_proj": Projection(width, config.num_key_value_heads, True, "kv_heads"),
            "decay_proj": Projection(width, config.num_key_value_heads, True, "kv_heads"),
            "g_proj": Projection(width, heads, True),
        }

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """The convolutions' last inputs and one matrix a group of heads."""
        head, groups = self.config.head_dim, self.config.num_key_value_heads
        projections, kept = self.projections(self.config), self.config.conv_size - 1
        specs = [
            StateSpec(f"conv_{n}", (kept, projections[f"{n}_proj"].out_features), dtype, "conv", shard_dim=1)
            for n in "qkv"
        ]
        return [*specs, StateSpec("recurrent", (groups, head, head), state_dtype(dtype), "recurrent", shard_dim=0)]

    def mix(
        self,
        p: dict[str, Tensor],
        state: LayerState,
        *,
        positions: Tensor,  # noqa: ARG002
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """`p` of q, k, v, beta, decay and g -> `[B, T, H * D]`."""
        heads, after = {}, {}
        for name, conv in self.conv.items():
            x = self._normed(name, p[f"{name}_proj"])
            x, after[f"conv_{name}"] = conv(x, state.get(f"conv_{name}"), cu_seqlens, mask)
            heads[name] = silu(x).unflatten(-1, (-1, self.config.head_dim))
        log_decay = logsigmoid(p["decay_proj"].to(state_dtype(heads["v"].dtype))) / self.config.gate["normalizer"]
        out, after["recurrent"] = gated_delta(
            normalize(heads["q"], dim=-1),
            normalize(heads["k"], dim=-1),
            heads["v"],
            p["beta_proj"].sigmoid()[..., None],
            log_decay[..., None],
            scale=self.config.head_dim**-0.5,
            state=state.get("recurrent"),
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        return self.g_norm(out).flatten(2) * silu(p["g_proj"]), after if state else {}

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """q and k normalised by head, where the model does so."""
        if not self.config.qk_norm or name == "v":
            return x
        return self.get_submodule(f"{name}_norm")(x.unflatten(-1, (-1, self.config.head_dim))).flatten(2)

    @staticmethod
    def init_from_attention(
        tensors: dict[str, Tensor],
        config: SpikingBrainConfig,
        generator: torch.Generator,  # noqa: ARG004
    ) -> dict[str, Tensor]:
        """Keep the attention's tensors. New: convolutions that pass the token alone, half the write strength, a
        half-life of 16 tokens, the output's gate open, the norm one.
        """
        like = tensors["k_proj.weight"]
        new = {"g_norm.weight": like.new_ones(config.head_dim)}
        for name in "qkv":
            new[f"conv.{name}.weight"] = like.new_zeros(len(tensors[f"{name}_proj.weight"]), 1, config.conv_size)
            new[f"conv.{name}.weight"][..., -1] = 1
        projections = Mixer.projections(config)
        for name, bias in (("beta_proj", 0.0), ("decay_proj", 0.0), ("g_proj", SILU_ONE)):
            new[f"{name}.weight"] = like.new_zeros(projections[name].out_features, config.hidden_size)
            new[f"{name}.bias"] = like.new_full((projections[name].out_features,), bias)
        return {**tensors, **new}
