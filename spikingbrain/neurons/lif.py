"""Leaky integrate-and-fire over tokens (STBP, arXiv 1706.02609; SpikeGPT, arXiv 2302.13939).

h_t = v_{t-1} + (x_t - v_{t-1}) / tau (decay on the input) or v_{t-1} - v_{t-1} / tau + x_t; s_t = [h_t >= v_th];
v_t = (1 - s_t) h_t (hard reset), h_t - v_th s_t (soft) or h_t (none).
"""

from typing import Any

import torch
from torch import Tensor

from spikingbrain_kernels import state_dtype

from .. import surrogates
from ..errors import InputError
from ..membrane import over_tokens
from ..state import LayerState, StateSpec
from . import Spikes, SpikingNeuron

RESETS = ("hard", "soft", "none")


class Neuron(SpikingNeuron):
    """`tau >= 1` in tokens, `v_th` in units of x, `reset`, `decay_input`, and the `surrogate` of the step function.

    A spike is worth `v_th`. The gradient goes through the reset too. Membranes are zero at first.
    """

    signed = False
    parallel = False

    def __init__(
        self,
        channels: int,
        *,
        tau: float = 2.0,
        v_th: float = 1.0,
        reset: str = "hard",
        decay_input: bool = True,
        surrogate: str = "atan",
    ):
        super().__init__(channels)
        if not (tau >= 1 and v_th > 0):
            raise InputError(f"lif: tau must be at least 1 and v_th above 0; got {tau} and {v_th}")
        if reset not in RESETS:
            raise InputError(f"lif: unknown reset {reset!r}; choose from {', '.join(RESETS)}")
        self.tau, self.v_th, self.reset, self.decay_input = tau, v_th, reset, decay_input
        self.derivative = surrogates.surrogate(surrogate)

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """The membrane of each channel."""
        return [StateSpec("membrane", (self.channels,), state_dtype(dtype), "recurrent")]

    def leak(self) -> float | Tensor:
        """1 / tau."""
        return 1 / self.tau

    def forward(self, x: Tensor, state: LayerState | None = None, **context: Any) -> Spikes:
        """`x [B, T, C]` -> counts of 0 and 1, scale `[B, T, 1]`, the membranes."""
        documents = {key: context.get(key) for key in ("cu_seqlens", "mask")}
        counts, membrane = over_tokens(self._step, x, (state or {}).get("membrane"), **documents)
        scale = torch.full_like(x[..., :1], self.v_th, dtype=state_dtype(x.dtype))
        return Spikes(counts, scale, {"membrane": membrane} if state else {})

    def _step(self, x: Tensor, membrane: Tensor) -> tuple[Tensor, Tensor]:
        gain = self.leak() if self.decay_input else 1.0
        charged = membrane - self.leak() * membrane + gain * x
        spike = surrogates.heaviside(charged - self.v_th, self.derivative)
        if self.reset == "hard":
            return spike, (1 - spike) * charged
        return spike, charged - self.v_th * spike if self.reset == "soft" else charged
