"""Generalised integrate-and-fire with more steps for salient channels (SpikeLLM, ICLR 2025, arXiv 2407.04752).

One step emits s in [-L, L], L = 2^(bits - 1) - 1; an ordinary channel has one step, a salient one T, and m <- m - s in
between, so its count reaches T L. V_th = max over channels of |x_c| / (T_c L): outliers no longer coarsen all others.
Optimal Brain Spiking: salient are the channels of the largest 1/2 (W^T W)_cc E[x_c^2], the diagonal Hessian of the
projections' outputs. The released code's steps cannot reach the top counts (its cap is 2^bits - 1 of 2^bits levels).
"""

import torch
from torch import Tensor

from ..errors import InputError
from . import Observation, Spikes, SpikingNeuron, straight_through, widen
from .adaptive import MIN_THRESHOLD


class Neuron(SpikingNeuron):
    """`bits` of one step; `steps` T of the share `salient` of the channels, which calibration chooses (none before).

    `drain`: further steps with half, a quarter, ... of the threshold that empty what the membrane is left with
    (SpikingIR's idea, AAAI 2026). The gradient passes straight through.
    """

    salient: Tensor

    def __init__(self, channels: int, *, bits: int = 4, steps: int = 2, salient: float = 0.1, drain: int = 0):
        super().__init__(channels)
        if not (2 <= bits <= 8 and steps >= 1 and 0 <= salient <= 1 and 0 <= drain <= 4):
            raise InputError(
                "gif: bits must be 2 to 8, steps at least 1, salient 0 to 1, drain 0 to 4; "
                f"got {bits}, {steps}, {salient}, {drain}"
            )
        self.limit = 2 ** (bits - 1) - 1
        self.steps, self.share, self.drain = steps, salient, drain
        self.register_buffer("salient", torch.zeros(channels, dtype=torch.bool))

    def calibrate(self, observed: Observation) -> None:
        """Choose the salient channels."""
        saliency = observed.hessian * observed.sample.square().mean(0) / 2
        chosen = saliency.topk(round(self.share * self.channels)).indices
        self.salient.zero_()
        self.salient[chosen] = True

    def reach(self) -> Tensor:
        """The largest count of each channel before draining `[C]`."""
        return torch.where(self.salient, self.steps * self.limit, self.limit)

    def fire(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> counts `[..., C]`, scale `[..., 1]`."""
        wide = widen(x)
        reach = self.reach().to(wide.dtype)
        scale = (wide.detach().abs() / reach).amax(-1, keepdim=True).clamp(min=MIN_THRESHOLD)
        level = wide / scale
        counts = level.detach().round()
        for _ in range(self.drain):
            residual = 2 * (level.detach() - counts)
            counts, level = 2 * counts + residual.round().clamp(-1, 1), 2 * level
            scale = scale / 2
        return Spikes(straight_through(level, counts).to(x.dtype), scale)
