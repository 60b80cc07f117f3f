"""MetaLA (arXiv 2411.10741): gated linear attention whose key is what the decay leaves free, k = 1 - decay."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, logsigmoid, silu

from spikingbrain_kernels import gated_linear, state_dtype

from ..config import SpikingBrainConfig
from ..convolution import ShortConvolution
from ..state import LayerState, StateSpec
from . import Projection

NORM_EPS = 1e-5
# silu(SILU_ONE) = 1: an output gate that starts open.
SILU_ONE = 1.2784645


class SelfAugmentation(nn.Module):
    """sigmoid((q . (w * k)) v): what the token says of itself, beside the state. q is not scaled here."""

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.balance = nn.Parameter(torch.zeros(config.num_attention_heads * config.head_dim // 2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q, k [B, T, H, K]`, `v [B, T, H, V]` -> `[B, T, H, V]`."""
        balance = self.balance.view(q.shape[2:])
        return ((q * balance * k).sum(-1, keepdim=True) * v).sigmoid()


class Mixer(nn.Module):
    """S_t = diag(a_t) S_{t-1} + (1 - a_t)^T v_t, o_t = norm(q_t S_t / sqrt(K) + augmentation) * silu(g_t).

    a_t = sigmoid(gate)^(1/normalizer). Everything reads a short convolution of the hidden states. Keys are half as wide
    as values; as many key heads as query heads; no positions. The norm over each head has no parameters.
    """

    kind = "diagonal"
    shard_dims = {"augmentation.balance": 0}

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.config = config
        self.conv1d = ShortConvolution(config.hidden_size, config.conv_size)
        self.augmentation = SelfAugmentation(config)

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """q, the decay's gate, v, the output's gate, o."""
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        return {
            "q_proj": Projection(width, inner // 2, config.qkv_bias, source="convolved"),
            "gate_proj": Projection(width, inner // 2, config.qkv_bias, source="convolved"),
            "v_proj": Projection(width, inner, config.qkv_bias, source="convolved"),
            "g_proj": Projection(width, inner, True, source="convolved"),
            "o_proj": Projection(inner, width, config.o_bias, source="mixed"),
        }

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """The convolution's last inputs and one matrix a head."""
        config = self.config
        matrix = (config.num_attention_heads, config.head_dim // 2, config.head_dim)
        return [
            StateSpec("conv", (config.conv_size - 1, config.hidden_size), dtype, "conv"),
            StateSpec("recurrent", matrix, state_dtype(dtype), "recurrent", shard_dim=0),
        ]

    def sources(
        self, hidden: Tensor, state: LayerState, *, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[dict[str, Tensor], LayerState]:
        """silu(conv(hidden))."""
        convolved, last = self.conv1d(hidden, state.get("conv"), cu_seqlens, mask)
        return {"convolved": silu(convolved)}, {"conv": last} if state else {}

    def mix(
        self,
        p: dict[str, Tensor],
        state: LayerState,
        *,
        positions: Tensor,  # noqa: ARG002
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """`p` of q, v and both gates -> `[B, T, H * V]`."""
        width = self.config.head_dim
        q, gate = (p[name].unflatten(-1, (-1, width // 2)) for name in ("q_proj", "gate_proj"))
        v = p["v_proj"].unflatten(-1, (-1, width))
        log_decay = logsigmoid(gate.to(state_dtype(gate.dtype))) / self.config.gate["normalizer"]
        k = -torch.expm1(log_decay)
        out, memory = gated_linear(
            q,
            k,
            v,
            log_decay,
            scale=q.shape[-1] ** -0.5,
            state=state.get("recurrent"),
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        out = out + self.augmentation(q, k.to(q.dtype), v)
        out = layer_norm(out, (width,), eps=NORM_EPS).flatten(2)
        return out * silu(p["g_proj"]), {"recurrent": memory} if state else {}

    @staticmethod
    def init_from_attention(
        tensors: dict[str, Tensor],
        config: SpikingBrainConfig,
        generator: torch.Generator,  # noqa: ARG004
    ) -> dict[str, Tensor]:
        """v and o are kept, q and k halved: of each rotary pair the first. New: the convolution, which passes the token
        alone, the output's gate, open, and no augmentation. k's sign turns: here a large key is a small gate.
        """
        like, groups = tensors["q_proj.weight"], config.num_attention_heads // config.num_key_value_heads
        new = {"o_proj.weight": tensors["o_proj.weight"]}
        new |= {"o_proj.bias": tensors["o_proj.bias"]} if config.o_bias else {}
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            q, k, v = (tensors[f"{name}_proj.{part}"].unflatten(0, (-1, config.head_dim)) for name in "qkv")
            half = config.head_dim // 2
            new[f"q_proj.{part}"] = q[:, :half].flatten(0, 1)
            new[f"gate_proj.{part}"] = -k[:, :half].repeat_interleave(groups, 0).flatten(0, 1)
            new[f"v_proj.{part}"] = v.repeat_interleave(groups, 0).flatten(0, 1)
        inner = config.num_attention_heads * config.head_dim
        new["g_proj.weight"] = like.new_zeros(inner, config.hidden_size)
        new["g_proj.bias"] = like.new_full((inner,), SILU_ONE)
        new["augmentation.balance"] = like.new_zeros(inner // 2)
        new["conv1d.weight"] = like.new_zeros(config.hidden_size, 1, config.conv_size)
        new["conv1d.weight"][..., -1] = 1
        return new
