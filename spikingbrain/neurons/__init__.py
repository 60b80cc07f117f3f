"""Neurons: one file each, from activations to integer spike counts.

A neuron file defines `class Neuron(SpikingNeuron)`: its constructor takes the number of channels and, as keywords, the
config's `spiking.params`. A threshold depends on one token only (or is state), never on the batch or the sequence, so
that batching and chunking change nothing. What is learned or calibrated is a tensor of the neuron, in the checkpoint
under `X.neuron.*`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..state import LayerState, StateSpec


class Spikes(NamedTuple):
    """`counts [..., C]`: whole numbers in x's type; `scale [..., 1]`: what one spike is worth. x ~ counts * scale.

    `state`: what a neuron with a memory keeps for the next tokens.
    """

    counts: Tensor
    scale: Tensor
    state: LayerState | None = None


class Observation(NamedTuple):
    """What calibration saw of the channels that a neuron encodes.

    `sample [N, C]`: their values at some tokens. `fisher [C]`: E[(dL/dx_c)^2] over tokens, L in nats. `hessian [C]`:
    the diagonal of W^T W of the weights that read them. `mean`: mean |x|. `outputs`: outputs that read each channel.
    """

    sample: Tensor
    fisher: Tensor
    hessian: Tensor
    mean: float
    outputs: float


class SpikingNeuron(nn.Module):
    """The contract. `signed`: whether counts can be negative; `parallel`: whether tokens fire independently."""

    signed = True
    parallel = True

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:  # noqa: ARG002
        """What it remembers of a sequence: nothing, unless the neuron says otherwise."""
        return []

    def calibrate(self, observed: Observation) -> None:
        """Set what it measures before training; nothing, unless the neuron says otherwise."""

    def fire(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> `Spikes`, each token alone."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: LayerState | None = None, **_context: Any) -> Spikes:
        """`x [B, T, C]`; the context (`cu_seqlens`, `mask`) matters to neurons with a memory only."""
        return self.fire(x)._replace(state=state)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in the forward pass, the gradient of `value` in the backward pass."""
    return value + (rounded - value).detach() if torch.is_grad_enabled() else rounded


def widen(x: Tensor) -> Tensor:
    """Thresholds are computed in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
