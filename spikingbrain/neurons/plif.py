"""Parametric leaky integrate-and-fire (arXiv 2007.05785): LIF with a learned time constant, 1 / tau = sigmoid(w)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import lif


class Neuron(lif.Neuron):
    """`tau > 1` is where the tensor `w [1]` starts; the rest is LIF's."""

    def __init__(self, channels: int, *, tau: float = 2.0, **options: Any):
        super().__init__(channels, tau=tau, **options)
        if not tau > 1:
            raise InputError(f"plif: tau must be above 1, got {tau}")
        self.w = nn.Parameter(torch.full((1,), -math.log(tau - 1)))

    def leak(self) -> Tensor:
        """1 / tau."""
        return torch.sigmoid(self.w)
