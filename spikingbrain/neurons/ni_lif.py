"""Normalised integer leaky integrate-and-fire (NI-LIF, Spike2Former, AAAI 2025): trained as integers, fired as D slots.

u_t = h_{t-1} + x_t, n_t = round(clip(u_t / v_th, 0, D)), h_t = decay (u_t - v_th n_t). The paper passes on n / D, for
which its weights carry 1 / D; here a spike is worth v_th, so that x ~ counts * scale.
"""

from typing import Any

import torch
from torch import Tensor

from spikingbrain_kernels import state_dtype

from ..errors import InputError
from ..membrane import over_tokens
from ..state import LayerState, StateSpec
from . import Spikes, SpikingNeuron, straight_through


class Neuron(SpikingNeuron):
    """`levels` D. `decay` of the membrane between tokens; 0, the paper's own setting, has none. `two_sided`: clip to
    [-D, D], for activations of both signs. The gradient passes straight through within the clip's range and is zero
    outside.
    """

    def __init__(
        self, channels: int, *, levels: int = 4, v_th: float = 1.0, decay: float = 0.0, two_sided: bool = True
    ):
        super().__init__(channels)
        if not (levels >= 1 and v_th > 0 and 0 <= decay < 1):
            raise InputError(
                f"ni_lif: levels must be at least 1, v_th above 0, decay in [0, 1); got {levels}, {v_th}, {decay}"
            )
        self.levels, self.v_th, self.decay = levels, v_th, decay
        self.signed, self.parallel = two_sided, decay == 0

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """The membrane of each channel, if there is a decay to remember it by."""
        if self.parallel:
            return []
        return [StateSpec("membrane", (self.channels,), state_dtype(dtype), "recurrent")]

    def forward(self, x: Tensor, state: LayerState | None = None, **context: Any) -> Spikes:
        """`x [B, T, C]` -> counts, scale `[B, T, 1]`, the membranes."""
        membrane = (state or {}).get("membrane")
        scale = torch.full_like(x[..., :1], self.v_th, dtype=state_dtype(x.dtype))
        if self.parallel:
            return Spikes(self._count(x.to(scale.dtype)).to(x.dtype), scale, state)
        documents = {key: context.get(key) for key in ("cu_seqlens", "mask")}
        counts, membrane = over_tokens(self._step, x, membrane, **documents)
        return Spikes(counts, scale, {"membrane": membrane} if state else {})

    def _count(self, charged: Tensor) -> Tensor:
        level = (charged / self.v_th).clamp(-self.levels if self.signed else 0, self.levels)
        return straight_through(level, level.round())

    def _step(self, x: Tensor, membrane: Tensor) -> tuple[Tensor, Tensor]:
        charged = membrane + x
        counts = self._count(charged)
        return counts, self.decay * (charged - self.v_th * counts)
