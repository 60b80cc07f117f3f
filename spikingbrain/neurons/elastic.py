"""Elastic bi-spiking (SpikeLM, arXiv 2406.03287): spikes of both signs with an amplitude and a firing rate.

For T steps of constant input x: s_t = clip(round(m_t / a), -1, 1), m_1 = x, m_{t+1} = decay (1 - |s_t|) m_t + x;
what is passed on is the mean a / T sum_t s_t. The released code has s in the place of |s|: spikes of one sign drain
the membrane and those of the other charge it.
"""

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import Observation, Spikes, SpikingNeuron, straight_through, widen
from .adaptive import mean_magnitude


class Neuron(SpikingNeuron):
    """`steps` T, `decay` of the membrane. The amplitude a = `amplitude` mean|x| of the token (the paper: of the first
    batch) fires where |m| >= a / 2. `rate`: the share of channels to fire at the first step, to which calibration sets
    the tensor `amplitude [1]`; 0.425 is that of Gaussian data at amplitude 2. The gradient passes straight through
    where |m / a| <= 1 and is zero outside.
    """

    def __init__(
        self, channels: int, *, amplitude: float = 2.0, rate: float = 0.425, steps: int = 4, decay: float = 0.25
    ):
        super().__init__(channels)
        if not (amplitude > 0 and 0 < rate < 1 and steps >= 1 and 0 <= decay <= 1):
            raise InputError(
                "elastic: amplitude must be above 0, rate between 0 and 1, steps at least 1, decay from 0 to 1; "
                f"got {amplitude}, {rate}, {steps}, {decay}"
            )
        self.amplitude = nn.Parameter(torch.full((1,), float(amplitude)))
        self.rate, self.steps, self.decay = rate, steps, decay

    def calibrate(self, observed: Observation) -> None:
        """Set the amplitude so that `rate` of the observed channels fires at the first step."""
        level = observed.sample.abs() / mean_magnitude(observed.sample)
        place = max(1, round((1 - self.rate) * level.numel()))
        self.amplitude.data.fill_(2 * float(level.flatten().kthvalue(place).values))

    def fire(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> counts in `[-T, T]`, scale `[..., 1]`."""
        wide = widen(x)
        amplitude = mean_magnitude(wide) * self.amplitude.to(wide.dtype)
        membrane, counts = wide, torch.zeros_like(wide)
        for _ in range(self.steps):
            level = (membrane / amplitude).clamp(-1, 1)
            spike = straight_through(level, level.round())
            counts = counts + spike
            membrane = self.decay * (1 - spike.abs()) * membrane + wide
        return Spikes(counts.to(x.dtype), amplitude / self.steps)
