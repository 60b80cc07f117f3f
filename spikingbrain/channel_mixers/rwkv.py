"""RWKV-4's channel mixing (arXiv 2305.13048, section 3.1.3), SpikeGPT's SRFFN: sigmoid(r) * value(relu(key)^2)."""

import torch
from torch import Tensor, nn

from ..config import SpikingBrainConfig
from ..convolution import TokenShift
from ..mixers import Projection
from ..state import LayerState, StateSpec


class Mixer(nn.Module):
    """Key and receptance read the token and the one before; the receptance gates what is projected back."""

    kind = "serial"

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.width = config.hidden_size
        self.shift = TokenShift(self.width, {"k": 0.5, "r": 0.5})

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:
        """key, receptance and, back, value."""
        width, inner = config.hidden_size, config.intermediate_size
        return {
            "k_proj": Projection(width, inner, config.mlp_bias, source="shifted_k"),
            "r_proj": Projection(width, width, config.mlp_bias, "replicate", source="shifted_r"),
            "v_proj": Projection(inner, width, config.mlp_bias, source="mixed"),
        }

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """The last token's hidden state."""
        return [StateSpec("shift", (1, self.width), dtype, "conv")]

    def sources(
        self, hidden: Tensor, state: LayerState, *, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[dict[str, Tensor], LayerState]:
        """What key and receptance are projected from."""
        shifted, last = self.shift(hidden, state.get("shift"), cu_seqlens, mask)
        return shifted, {"shift": last} if state else {}

    def mix(
        self,
        p: dict[str, Tensor],
        state: LayerState,  # noqa: ARG002
        *,
        positions: Tensor,  # noqa: ARG002
        cu_seqlens: Tensor | None,  # noqa: ARG002
        mask: Tensor | None,  # noqa: ARG002
    ) -> tuple[Tensor, LayerState]:
        """relu(key)^2 `[B, T, inner]`."""
        return p["k_proj"].relu().square(), {}

    def finish(self, p: dict[str, Tensor], out: Tensor) -> Tensor:
        """Gate `out [B, T, C]`, which was projected back."""
        return p["r_proj"].sigmoid() * out
