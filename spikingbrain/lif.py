"""Neurons whose time is the sequence (SpikeGPT, arXiv 2302.13939): their membranes are part of the model's state."""

import torch
from torch import Tensor, nn

from spikingbrain_kernels import lif_scan, state_dtype

from .config import SpikingBrainConfig
from .state import LayerState, StateSpec


class LIF(nn.Module):
    """One leaky integrate-and-fire neuron a channel, on what a block adds to the residual stream.

    `lif` in the config: tau (tokens), v_th, v_reset (None: soft reset), decay_input. No parameters.
    """

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.width = config.hidden_size
        self.options = dict(config.lif)

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """The membranes."""
        return [StateSpec("membrane", (self.width,), state_dtype(dtype), "recurrent")]

    def forward(
        self, x: Tensor, state: LayerState, *, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """`x [B, T, C]` -> spikes, 0 or 1, and the new state."""
        spikes, membrane = lif_scan(x, **self.options, state=state.get("membrane"), cu_seqlens=cu_seqlens, mask=mask)
        return spikes, {"membrane": membrane} if state else {}
