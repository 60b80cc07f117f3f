"""Neurons: one file each, from activations to integer spike counts.

A neuron file defines `class Neuron(nn.Module)`: its constructor's keywords are the config's `spiking.params`, `signed`
says whether counts can be negative, and `forward(x [..., C]) -> Spikes`. A threshold depends on one token only (or is
state), never on the batch or the sequence, so that batching and chunking change nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Spikes(NamedTuple):
    """`counts [..., C]`: whole numbers in x's type; `scale [..., 1]`: what one spike is worth. x ~ counts * scale."""

    counts: Tensor
    scale: Tensor


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in the forward pass, the gradient of `value` in the backward pass."""
    return value + (rounded - value).detach() if torch.is_grad_enabled() else rounded
