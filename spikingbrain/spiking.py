"""Spikes inside a model: the encoder before a group of projections, the projection that takes counts, the recorder."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .codes import encode
from .neurons import Spikes


class SpikeEncoder(nn.Module):
    """Turns what a group of projections reads into spikes, once for the group."""

    def __init__(self, spiking: dict[str, Any]):
        super().__init__()
        self.neuron = registry.load("neurons", spiking["neuron"]).Neuron(**spiking["params"])

    def forward(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> `Spikes`."""
        return self.neuron(x)


class SpikingLinear(nn.Linear):
    """A projection of spikes: scale * (counts W^T) + b. The same weights as the dense projection it stands for."""

    def forward(self, spikes: Spikes) -> Tensor:  # type: ignore[override]
        """`Spikes [..., in]` -> `[..., out]`."""
        out = nn.functional.linear(spikes.counts, self.weight) * spikes.scale.to(spikes.counts.dtype)
        return out if self.bias is None else out + self.bias


@dataclass
class SpikeRecord:
    """What fired, by the name of the encoder: one entry a forward pass, in order. `code` names the spike code."""

    code: str
    counts: dict[str, list[Tensor]] = field(default_factory=dict)

    def planes(self, name: str, call: int = -1) -> Tensor:
        """Spikes `[S, B, T, C]` (int8) of one encoder in one forward pass."""
        return encode(registry.load("codes", self.code), self.counts[name][call])


@contextlib.contextmanager
def record_spikes(model: Any) -> Iterator[SpikeRecord]:
    """Collect every encoder's counts (int32, on the CPU) while the block runs. `model` has a config with `spiking`."""
    spiking = model.config.spiking
    record = SpikeRecord(spiking["code"] if spiking else "bitwise")

    def listen(name: str):
        record.counts[name] = []
        return lambda _module, _inputs, spikes: record.counts[name].append(
            spikes.counts.detach().to("cpu", torch.int32)
        )

    encoders = {name: module for name, module in model.named_modules() if isinstance(module, SpikeEncoder)}
    handles = [module.register_forward_hook(listen(name)) for name, module in encoders.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
