"""Adaptive threshold (SpikingBrain, arXiv 2509.05276, eq. 19-21): V_th = mean|x| / k, counts = round(x / V_th)."""

import torch
from torch import Tensor, nn

from spikingbrain_kernels import encode_adaptive

from ..errors import InputError
from . import Spikes, straight_through

# The threshold's bounds in the released W8ASpike code; they matter for all-zero and enormous inputs only.
MIN_THRESHOLD, MAX_THRESHOLD = 1e-5, 1e4


class Neuron(nn.Module):
    """Integrate-and-fire with soft reset, its time collapsed into one count a channel.

    `k`: the mean count of a channel, so larger is finer; > 0. The threshold is one token's, over its channels. The
    gradient passes straight through the rounding.
    """

    signed = True

    def __init__(self, k: float = 3.0):
        super().__init__()
        if not k > 0:
            raise InputError(f"adaptive: k must be above 0, got {k}")
        self.k = k

    def forward(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> counts `[..., C]`, scale `[..., 1]`."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return Spikes(*encode_adaptive(x, k=self.k, low=MIN_THRESHOLD, high=MAX_THRESHOLD))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.detach().abs().mean(-1, keepdim=True) / self.k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
        level = wide / scale
        return Spikes(straight_through(level, level.round()).to(x.dtype), scale)
