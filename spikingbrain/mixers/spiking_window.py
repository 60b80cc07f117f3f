"""Window attention as the released W8ASpike code computes it: queries are spikes, keys and values have 8 bits."""

import torch
from torch import Tensor

from .. import registry
from ..config import SPIKING_DEFAULTS, SpikingBrainConfig
from ..errors import InputError
from ..neurons import straight_through
from . import sliding_window

LARGEST = 127


class Mixer(sliding_window.Mixer):
    """Sliding-window attention over quantised tensors.

    After rotation each head of a query is replaced by counts * scale of the model's neuron, and each head of a key or a
    value by its symmetric int8 quantisation, both of one token. The ring holds the quantised values.
    """

    def __init__(self, config: SpikingBrainConfig):
        super().__init__(config)
        spiking = config.spiking or SPIKING_DEFAULTS
        self.neuron = registry.load("neurons", spiking["neuron"]).Neuron(config.head_dim, **spiking["params"])
        if not self.neuron.parallel:
            raise InputError(f"spiking_window: {spiking['neuron']} has a memory; queries fire token by token")

    def heads(self, p: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v by head `[B, T, H, D]`, rotated, then quantised."""
        q, k, v = super().heads(p, positions)
        counts, scale, _ = self.neuron(q)
        return (counts * scale).to(q.dtype), quantized(k), quantized(v)


def quantized(x: Tensor) -> Tensor:
    """`x [..., D]` to the nearest of 255 levels a head, the largest of them max|x|; the gradient passes through."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny) / LARGEST
    level = (wide / scale).round()
    return straight_through(wide, level * scale).to(x.dtype)
