"""Spike statistics with names, never just "sparsity", beside the same figures for Gaussian data and no training."""

from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .codes import encode
from .model import MixerBlock
from .spiking import SpikeEncoder, SpikeRecord

GAUSSIAN_TOKENS = 512


def spike_statistics(counts: Tensor, code: str, steps: int | None = None) -> dict[str, float]:
    """Figures of integer `counts [..., C]`:

    silent_channels: share of channels whose count is 0 (what a processor can skip). mean_spikes: mean |count|.
    steps: time steps T of the code. slot_sparsity: share of the T slots a channel has that hold no spike.
    spikes_per_channel: spikes sent, which is (1 - slot_sparsity) T.
    """
    planes = encode(registry.load("codes", code), counts, steps)
    sent = float(planes.count_nonzero()) / counts.numel()
    steps = len(planes)
    return {
        "silent_channels": float((counts == 0).float().mean()),
        "mean_spikes": float(counts.abs().float().mean()),
        "steps": steps,
        "slot_sparsity": 1 - sent / steps if steps else 1.0,
        "spikes_per_channel": sent,
    }


def recorded_statistics(model: nn.Module, record: SpikeRecord) -> dict[str, Any]:
    """The statistics of every encoder, of all together, and of Gaussian data sent through the same neuron.

    `synaptic_operations_per_token`: one addition for each spike sent and each output it reaches; beside it
    `dense_operations_per_token`, the multiplications of the same projections.
    """
    modules = dict(model.named_modules())
    layers, channels, synaptic, dense = {}, 0.0, 0.0, 0.0
    totals = {"silent_channels": 0.0, "mean_spikes": 0.0, "slot_sparsity": 0.0}
    collected = {name: torch.cat([c.flatten(0, -2) for c in calls]) for name, calls in record.counts.items()}
    num_tokens = max(map(len, collected.values()))
    for name, counts in collected.items():
        # An expert sees some of the tokens, or none.
        if not len(counts):
            continue
        figures = spike_statistics(counts, record.code)
        outputs = _outputs(modules[name.rpartition(".encoders.")[0]], name.rpartition(".")[2])
        width = counts.shape[-1] * len(counts) / num_tokens
        layers[name] = figures
        channels += width
        synaptic += figures["spikes_per_channel"] * width * outputs
        dense += width * outputs
        for key in totals:
            totals[key] += figures[key] * width
    return {
        "code": record.code,
        "overall": {key: value / channels for key, value in totals.items()},
        "synaptic_operations_per_token": synaptic,
        "dense_operations_per_token": dense,
        "gaussian": gaussian_statistics(next(m for m in modules.values() if isinstance(m, SpikeEncoder)), record.code),
        "encoders": layers,
    }


def gaussian_statistics(encoder: SpikeEncoder, code: str) -> dict[str, float]:
    """What the neuron does with standard normal noise: the figure a trained model's is to be compared with."""
    noise = torch.randn(GAUSSIAN_TOKENS, encoder.neuron.channels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return spike_statistics(encoder(noise).counts, code)


def _outputs(block: MixerBlock, source: str) -> int:
    """How many outputs the spikes of one source reach."""
    return sum(p.out_features for p in block.projections.values() if p.source == source)
