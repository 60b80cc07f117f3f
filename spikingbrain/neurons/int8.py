"""Absmax quantiser (SpikingBrain 2.0, arXiv 2604.22575): V_th = max|x| / (2^(bits - 1) - 1), counts = round(x / V_th).

Its counts fit `bits` bits with a sign, so that a bitwise code has `bits - 1` steps.
"""

from torch import Tensor

from ..errors import InputError
from . import Spikes, SpikingNeuron, straight_through, widen
from .adaptive import MIN_THRESHOLD


class Neuron(SpikingNeuron):
    """`bits` (2 to 8): the largest channel of a token gets the largest count. The gradient passes straight through."""

    def __init__(self, channels: int, *, bits: int = 8):
        super().__init__(channels)
        if not 2 <= bits <= 8:
            raise InputError(f"int8: bits must be between 2 and 8, got {bits}")
        self.largest = 2 ** (bits - 1) - 1

    def fire(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> counts in `[-largest, largest]`, scale `[..., 1]`."""
        wide = widen(x)
        scale = (wide.detach().abs().amax(-1, keepdim=True) / self.largest).clamp(min=MIN_THRESHOLD)
        level = wide / scale
        return Spikes(straight_through(level, level.round()).to(x.dtype), scale)
