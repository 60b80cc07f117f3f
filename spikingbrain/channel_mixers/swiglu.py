"""SwiGLU (arXiv 2002.05202): down(act(gate x) * up x)."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from spikingbrain_kernels import swiglu

from ..config import SpikingBrainConfig
from ..mixers import Projection
from ..state import LayerState, StateSpec


class Mixer(nn.Module):
    """No state: each token alone."""

    kind = "diagonal"

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.is_silu = config.hidden_act == "silu"
        self.activation = ACT2FN[config.hidden_act]

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """gate, up, down."""
        width, inner = config.hidden_size, config.intermediate_size
        return {
            "gate_proj": Projection(width, inner, config.mlp_bias),
            "up_proj": Projection(width, inner, config.mlp_bias),
            "down_proj": Projection(inner, width, config.mlp_bias, source="mixed"),
        }

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:  # noqa: ARG002
        """Nothing is remembered."""
        return []

    def mix(
        self,
        p: dict[str, Tensor],
        state: LayerState,
        *,
        positions: Tensor,  # noqa: ARG002
        cu_seqlens: Tensor | None,  # noqa: ARG002
        mask: Tensor | None,  # noqa: ARG002
    ) -> tuple[Tensor, LayerState]:
        """`p` of gate and up -> `[B, T, inner]`."""
        gate, up = p["gate_proj"], p["up_proj"]
        return swiglu(gate, up) if self.is_silu else self.activation(gate) * up, state
