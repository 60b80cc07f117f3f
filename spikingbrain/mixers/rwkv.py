"""RWKV-4's time mixing (arXiv 2305.13048, section 3.1.2), as SpikeGPT has it (arXiv 2302.13939)."""

import math

import torch
from torch import Tensor, nn

from spikingbrain_kernels import Slots, state_dtype, wkv

from ..config import SpikingBrainConfig
from ..convolution import TokenShift
from ..errors import InputError
from ..state import LayerState, StateSpec
from . import Projection

# Exponents of mu over the channels; the authors let them vary with depth around these.
SHIFTS = {"k": 0.5, "v": 0.5, "r": 0.25}


class WKV(nn.Module):
    """A weighted mean of values: one decay and one bonus for the present token a channel."""

    def __init__(self, width: int):
        super().__init__()
        channel = torch.arange(width)
        self.time_decay = nn.Parameter(-5 + 8 * (channel / max(width - 1, 1)) ** 1.35)
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))

    def forward(
        self, k: Tensor, v: Tensor, state: Tensor | Slots | None, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | Slots]:
        """`k, v [B, T, C]` -> the same and the new state."""
        return wkv(k, v, self.time_decay, self.time_first, state=state, cu_seqlens=cu_seqlens, mask=mask)


class Mixer(nn.Module):
    """sigmoid(r_t) * wkv_t, with k, v and r from the token and the one before. As wide as the model; no heads."""

    kind = "serial"
    shard_dims = {"wkv.time_decay": 0, "wkv.time_first": 0}

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.width = config.hidden_size
        self.shift = TokenShift(self.width, SHIFTS)
        self.wkv = WKV(self.width)

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """k, v, r (receptance), o."""
        width = config.hidden_size
        read = {f"{name}_proj": Projection(width, width, config.qkv_bias, source=f"shifted_{name}") for name in SHIFTS}
        return {**read, "o_proj": Projection(width, width, config.o_bias, source="mixed")}

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """The last token's hidden state; numerator, denominator and largest exponent a channel."""
        return [
            StateSpec("shift", (1, self.width), dtype, "conv"),
            StateSpec("wkv", (3, self.width), state_dtype(dtype), "recurrent", shard_dim=1),
        ]

    def sources(
        self, hidden: Tensor, state: LayerState, *, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[dict[str, Tensor], LayerState]:
        """What k, v and r are projected from."""
        shifted, last = self.shift(hidden, state.get("shift"), cu_seqlens, mask)
        return shifted, {"shift": last} if state else {}

    def mix(
        self,
        p: dict[str, Tensor],
        state: LayerState,
        *,
        positions: Tensor,  # noqa: ARG002
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """`p` of k, v and r -> `[B, T, C]`."""
        out, memory = self.wkv(p["k_proj"], p["v_proj"], state.get("wkv"), cu_seqlens, mask)
        return p["r_proj"].sigmoid() * out, {"wkv": memory} if state else {}

    @staticmethod
    def init_from_attention(
        tensors: dict[str, Tensor],
        config: SpikingBrainConfig,
        generator: torch.Generator,  # noqa: ARG004
    ) -> dict[str, Tensor]:
        """k, v and o are kept, a group's heads separate. New: the receptance, one half; no token shift; the decay."""
        width = config.hidden_size
        if config.num_attention_heads * config.head_dim != width:
            raise InputError(f"rwkv is as wide as the model: {width}, not {config.num_attention_heads} heads")
        groups = config.num_attention_heads // config.num_key_value_heads
        new = {name: tensor for name, tensor in tensors.items() if name.startswith("o_proj.")}
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            for name in ("k_proj", "v_proj"):
                heads = tensors[f"{name}.{part}"].unflatten(0, (-1, config.head_dim))
                new[f"{name}.{part}"] = heads.repeat_interleave(groups, 0).flatten(0, 1)
            new[f"r_proj.{part}"] = torch.zeros_like(new[f"k_proj.{part}"])
        like = tensors["k_proj.weight"]
        new |= {f"shift.time_mix_{name}": like.new_ones(1, 1, width) for name in SHIFTS}
        first = WKV(width)
        return {**new, **{f"wkv.{name}": tensor.data.to(like.dtype) for name, tensor in first.named_parameters()}}
