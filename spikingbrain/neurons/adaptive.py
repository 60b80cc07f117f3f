"""Adaptive threshold (SpikingBrain, arXiv 2509.05276, eq. 19-21): V_th = mean|x| / k, counts = round(x / V_th)."""

import torch
from torch import Tensor

from spikingbrain_kernels import encode_adaptive

from ..errors import InputError
from . import Spikes, SpikingNeuron, straight_through, widen

# The threshold's bounds in the released W8ASpike code; they matter for all-zero and enormous inputs only.
MIN_THRESHOLD, MAX_THRESHOLD = 1e-5, 1e4


class Neuron(SpikingNeuron):
    """Integrate-and-fire with soft reset, its time collapsed into one count a channel.

    `k`: the mean count of a channel, so larger is finer; > 0. The threshold is one token's, over its channels. The
    gradient passes straight through the rounding.
    """

    def __init__(self, channels: int, *, k: float = 3.0):
        super().__init__(channels)
        if not k > 0:
            raise InputError(f"adaptive: k must be above 0, got {k}")
        self.k = k

    def fire(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> counts `[..., C]`, scale `[..., 1]`."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return Spikes(*encode_adaptive(x, k=self.k, low=MIN_THRESHOLD, high=MAX_THRESHOLD))
        wide = widen(x)
        scale = mean_magnitude(wide, self.k)
        level = wide / scale
        return Spikes(straight_through(level, level.round()).to(x.dtype), scale)


def mean_magnitude(x: Tensor, k: float | Tensor = 1.0) -> Tensor:
    """mean|x| / k over the channels of each token `[..., 1]`, within the bounds; no gradient to x."""
    return (x.detach().abs().mean(-1, keepdim=True) / k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
