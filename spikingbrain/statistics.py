"""Spike statistics with names, never just "sparsity", beside the same figures for random data and no training."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .codes import encode
from .spiking import SpikeEncoder, SpikeRecord, encoders, readers

BASELINE_TOKENS, BASELINE_CHANNELS = 512, 1024
BASELINES: dict[str, Any] = {
    "gaussian": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
}
# Counts above this share the histogram's last place.
HISTOGRAM_LAST = 16
# SpikingBrain-7B at k = 3 (arXiv 2509.05276, section 5.5), and the steps by which its "sparsity" could be counted.
PAPER = {"sparsity": 0.6915, "silent_channels": 0.184, "mean_spikes": 1.13}


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
    """The statistics of every encoder, of all together, and of random data sent through the same neurons.

    `unread_weights`: the share of the spiking projections' weights that need not be read, as their channel is silent.
    `membrane_updates_per_token`: thresholds computed, one a channel.

    `synaptic_operations_per_token`: one addition for each spike sent and each output it reaches; beside it
    `dense_operations_per_token`, the multiplications of the same projections.
    """
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {}
    channels, synaptic, dense, unread = 0.0, 0.0, 0.0, 0.0
    totals = {"silent_channels": 0.0, "mean_spikes": 0.0, "slot_sparsity": 0.0}
    collected = {name: torch.cat([c.flatten(0, -2) for c in calls]) for name, calls in record.counts.items()}
    num_tokens = max(map(len, collected.values()))
    for name, counts in collected.items():
        # An expert sees some of the tokens, or none.
        if not len(counts):
            continue
        figures: dict[str, Any] = dict(spike_statistics(counts, record.code))
        figures["histogram"] = histogram(counts)
        figures |= baseline_statistics(modules[name], record.code)
        outputs = sum(linear.out_features for linear in readers(model, name).values())
        width = counts.shape[-1] * len(counts) / num_tokens
        layers[name] = figures
        channels += width
        synaptic += figures["spikes_per_channel"] * width * outputs
        dense += width * outputs
        unread += figures["silent_channels"] * width * outputs
        for key in totals:
            totals[key] += figures[key] * width
    return {
        "code": record.code,
        "overall": {key: value / channels for key, value in totals.items()},
        "unread_weights": unread / dense,
        "membrane_updates_per_token": channels,
        "synaptic_operations_per_token": synaptic,
        "dense_operations_per_token": dense,
        **{name: _mean([layer[name] for layer in layers.values()]) for name in BASELINES},
        "encoders": layers,
    }


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def baseline_statistics(encoder: SpikeEncoder, code: str) -> dict[str, dict[str, float]]:
    """What the neuron does with Gaussian and Laplace noise: the figures that a trained model's are compared with."""
    return {name: spike_statistics(noise_counts(encoder, name), code) for name in BASELINES}


@torch.no_grad()
def noise_counts(encoder: SpikeEncoder, name: str) -> Tensor:
    """Counts `[1, tokens, C]` of one kind of noise of unit scale, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = BASELINES[name].sample((1, BASELINE_TOKENS, encoder.neuron.channels))
    return encoder(noise.to(next(encoder.parameters(), noise).dtype)).counts


def histogram(counts: Tensor) -> list[float]:
    """Share of channels with |count| = 0, 1, ..., 15, and 16 or more."""
    places = counts.abs().flatten().long().clamp(max=HISTOGRAM_LAST)
    return (torch.bincount(places, minlength=HISTOGRAM_LAST + 1) / counts.numel()).tolist()


def statistics_by_kind(record: SpikeRecord, kinds: Tensor, names: list[str]) -> dict[str, dict[str, float]]:
    """Silent channels and mean spikes, over all encoders, of the tokens of each kind; `kinds [B, T]` indexes `names`.

    The last forward pass counts. Kinds without a token are left out.
    """
    figures = {}
    for number, name in enumerate(names):
        chosen = kinds == number
        if bool(chosen.any()):
            counts = torch.cat([calls[-1][chosen].flatten() for calls in record.counts.values()])
            silent, mean = float((counts == 0).float().mean()), float(counts.abs().float().mean())
            figures[name] = {"tokens": int(chosen.sum()), "silent_channels": silent, "mean_spikes": mean}
    return figures


def token_kinds(tokenizer: Any, ids: Tensor) -> tuple[Tensor, list[str]]:
    """The kind of each token `[B, T]`: word, number, space, punctuation or special; and the kinds' names."""
    names = ["word", "number", "space", "punctuation", "special"]
    table = {int(number): _kind(tokenizer, int(number)) for number in ids.unique()}
    return torch.tensor([[names.index(table[n]) for n in row] for row in ids.tolist()]), names


def _kind(tokenizer: Any, number: int) -> str:
    if number in tokenizer.all_special_ids:
        return "special"
    text = tokenizer.decode([number]).strip()
    if not text:
        return "space"
    if text.isdigit():
        return "number"
    return "word" if any(letter.isalnum() for letter in text) else "punctuation"


def readings(counts: Tensor) -> dict[str, float]:
    """Every figure that "sparsity" has been used for, of the same counts."""
    one = spike_statistics(counts, "bitwise")
    sent = one["spikes_per_channel"]
    return {
        "silent channels (zero counts)": one["silent_channels"],
        "mean |count|": one["mean_spikes"],
        "mean spikes a channel (bitwise)": sent,
        "1 - mean / 3": 1 - sent / 3,
        "1 - mean / 4": 1 - sent / 4,
        "slots the tensor needs (T)": one["steps"],
        "empty slots at that T": one["slot_sparsity"],
    }


@contextlib.contextmanager
def read_at_k_3(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """The readings of noise and, after the block, of what the model's encoders read in it, all through `adaptive` at 3.

    Whatever neuron the model has, this compares with the paper. The model's own figures are means over its encoders.
    """
    encoder = SpikeEncoder({"neuron": "adaptive", "params": {"k": 3.0}}, BASELINE_CHANNELS)
    columns = {name: readings(noise_counts(encoder, name)) for name in BASELINES}
    own: list[dict[str, float]] = []

    def read(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        own.append(readings(encoder(inputs[0]).counts))

    with contextlib.ExitStack() as hooks:
        for other in encoders(model).values():
            hooks.enter_context(other.register_forward_pre_hook(read))
        yield columns
    columns["this model"] = _mean(own)
