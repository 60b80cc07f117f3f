"""Spikes inside a model: the encoder before a group of projections, the projection that takes counts, the recorder."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .codes import encode
from .integer import WEIGHTS
from .neurons import Spikes
from .state import LayerState


class SpikeEncoder(nn.Module):
    """Turns the `channels` that a group of projections reads into spikes, once for the group."""

    def __init__(self, spiking: dict[str, Any], channels: int):
        super().__init__()
        self.neuron = registry.load("neurons", spiking["neuron"]).Neuron(channels, **spiking["params"])

    def forward(self, x: Tensor, state: LayerState | None = None, **context: Any) -> Spikes:
        """`x [B, T, C]` -> `Spikes`; `state` and the context (`cu_seqlens`, `mask`) are for neurons with a memory."""
        return self.neuron(x, state, **context)


def encoders(model: nn.Module) -> dict[str, SpikeEncoder]:
    """Every encoder of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikeEncoder)}


class SpikingLinear(nn.Linear):
    """A projection of spikes: scale * (counts W^T) + b. The same weights as the dense projection it stands for.

    `weights`: what W is of them, "float" (themselves), "ternary" or "wage"; see `integer`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, weights: str = "float"):
        super().__init__(in_features, out_features, bias)
        self.reading, self.product = WEIGHTS[weights]

    def forward(self, spikes: Spikes) -> Tensor:  # type: ignore[override]
        """`Spikes [..., in]` -> `[..., out]`."""
        out = self.product(spikes.counts, self.weight) * spikes.scale.to(spikes.counts.dtype)
        return out if self.bias is None else out + self.bias


class SpikingHead(SpikingLinear):
    """A language-model head that reads spikes of the last hidden states; its encoder is its own, its weights floats."""

    def __init__(self, spiking: dict[str, Any], in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.encoder = SpikeEncoder(spiking, in_features)

    def readers(self, _source: str) -> dict[str, SpikingLinear]:
        """What reads the spikes of its encoder: itself."""
        return {"lm_head": self}

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """`hidden [..., in]` -> logits `[..., out]`."""
        return super().forward(self.encoder(hidden))


def readers(model: nn.Module, name: str) -> dict[str, SpikingLinear]:
    """The projections, by name, that read the spikes of the encoder `name` of `model`."""
    place, _, source = name.rpartition(".")
    owner: Any = model.get_submodule(place.removesuffix(".encoders"))
    return owner.readers(source)


def weights_read_by(model: nn.Module) -> dict[str, int]:
    """How many weights the spikes of each encoder are multiplied with, were none silent."""
    return {name: sum(x.weight.numel() for x in readers(model, name).values()) for name in encoders(model)}


@dataclass
class Silence:
    """`channels`: the share of silent channels in each call of an encoder; `weights`: how many its tokens stand for."""

    channels: list[Tensor] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)

    def share(self) -> Tensor:
        """The share of weights that need not be read, differentiable. Every token counts what it would read."""
        total = sum(self.weights)
        parts = [share * (size / total) for share, size in zip(self.channels, self.weights, strict=True)]
        return torch.stack(parts).sum()


@contextlib.contextmanager
def collect_silence(model: nn.Module) -> Iterator[Silence]:
    """Collect the silence of every encoder while the block runs. The model's neurons have `silence(x, counts)`.

    An encoder without tokens, as in an expert that none was sent to, has no part in it.
    """
    silence = Silence()
    sizes = weights_read_by(model)

    def listen(name: str):
        def see(module: nn.Module, inputs: tuple[Tensor, ...], spikes: Spikes) -> None:
            tokens = inputs[0].shape[:-1].numel()
            if tokens:
                share = module.neuron.silence(inputs[0], spikes.counts)  # type: ignore[operator, union-attr]
                silence.channels.append(share)
                silence.weights.append(tokens * sizes[name])

        return see

    with contextlib.ExitStack() as hooks:
        for name, encoder in encoders(model).items():
            hooks.enter_context(encoder.register_forward_hook(listen(name)))
        yield silence


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

    with contextlib.ExitStack() as hooks:
        for name, encoder in encoders(model).items():
            hooks.enter_context(encoder.register_forward_hook(listen(name)))
        yield record
