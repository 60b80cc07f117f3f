"""Mixture of SwiGLU experts: shared ones for every token, of the others a few a token (SpikingBrain-76B)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SpikingBrainConfig
from ..errors import InputError
from ..experts import Router, combine, dispatch, group, run_expert, run_experts
from ..mixers import Projection
from ..model import MixerBlock
from ..state import LayerState, StateSpec


class Mixer(nn.Module):
    """y = sum over shared experts of E(x) + sum over the top k of p_e E_e(x) (arXiv 2509.05276, eq. 7).

    p_e is the router's score, not divided by the sum over the chosen ones, so that the router learns with k = 1. Every
    expert is a dense feed-forward block of the model's size. No state: each token alone; how many tokens share an
    expert's matrix product can change a token's last bits.
    """

    kind = "diagonal"
    run_experts: Callable[..., Tensor]

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.router = Router(config.hidden_size, config.moe)
        self.experts = _blocks(config, config.moe["num_experts"])
        self.shared = _blocks(config, config.moe["num_shared"])
        # Expert parallelism puts its own here.
        self.run_experts = run_experts
        expert: Any = self.experts[0]
        if expert.state_specs(torch.float32):
            raise InputError("a neuron with memory cannot sit in an expert: its tokens come from many sequences")

    @staticmethod
    def projections(config: SpikingBrainConfig) -> dict[str, Projection]:  # noqa: ARG004
        """None: the experts have their own."""
        return {}

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
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """`p` of hidden `[B, T, D]` -> `[B, T, D]`; tokens masked out are sent nowhere."""
        hidden = p["hidden"]
        if mask is None:
            return self._experts(hidden.flatten(0, 1)).view_as(hidden), state
        out = self._experts(hidden[mask])
        return torch.zeros_like(hidden, dtype=out.dtype).masked_scatter(mask[..., None], out), state

    def _experts(self, x: Tensor) -> Tensor:
        """`x [N, D]` -> `[N, D]`."""
        routing = self.router(x)
        groups = group(routing.experts, len(self.experts))
        out = combine(self.run_experts(list(self.experts), dispatch(x, groups), groups.sizes), groups, routing.weights)
        for expert in self.shared:
            out = out + run_expert(expert, x)
        return out


def _blocks(config: SpikingBrainConfig, count: int) -> Any:
    return nn.ModuleList(MixerBlock(config, "channel_mixers", "swiglu") for _ in range(count))
