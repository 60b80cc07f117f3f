"""Tokens a second of a prompt read at once: packed in fp32, bf16 and int8, with spikes too; Qwen2 beside them."""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from ..model import SpikingBrainForCausalLM
from ..packing import prepare
from . import Row, require_close, seconds
from .models import ADAPTIVE, DTYPES, ours, qwen2, read

# What logits may differ by once weights are packed. With spikes nothing bounds it: a neuron may be near its threshold.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "int8": 0.15}
SPIKES = "int8-spikes"
Call = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model CONFIG --layers N --dtypes fp32 ... --lengths N ... --peer-up-to N --repeats N --chunk N"""
    parser.add_argument("--model", default="configs/models/qwen2.5-0.5b-shape.json", help="config file of the shape")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--dtypes", nargs="+", choices=[*TOLERANCE, SPIKES], default=[*TOLERANCE, SPIKES])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096], help="tokens of the prompt")
    parser.add_argument("--peer-up-to", type=int, default=4096, help="Qwen2 reads no longer prompt (square)")
    parser.add_argument("--repeats", type=int, default=3, help="prompts timed, of which the median is shown")
    parser.add_argument("--chunk", type=int, default=512, help="tokens a step of ours")


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Row]:
    """A row for each model and length."""
    models = {kind: _model(kind, args) for kind in args.dtypes}
    peers = {f"Qwen2 {kind}": qwen2(models[kind].config, kind) for kind in args.dtypes if kind in DTYPES}
    rows: list[Row] = []
    for length in args.lengths:
        tokens = torch.randint(0, next(iter(models.values())).config.vocab_size, (1, length))
        calls: dict[str, Call] = {kind: partial(read, model, tokens, args.chunk) for kind, model in models.items()}
        if length <= args.peer_up_to:
            calls |= {name: partial(peer, tokens, logits_to_keep=1) for name, peer in peers.items()}
        for name, took in _medians(calls, args.repeats).items():
            rows.append({"model": name, "tokens": length, "s": took, "tokens/s": length / took})
    return rows


def _model(kind: str, args: argparse.Namespace) -> SpikingBrainForCausalLM:
    spiking = ADAPTIVE if kind == SPIKES else None
    model = ours(args.model, kind if kind in DTYPES else "bf16", args.layers, spiking=spiking)
    prompt = torch.randint(0, model.config.vocab_size, (1, 70))
    expected = read(model, prompt, args.chunk)
    prepare(model, "int8" if kind == SPIKES else kind)
    found = read(model, prompt, args.chunk)
    if kind in TOLERANCE:
        require_close(f"the model in {kind}", found, expected, TOLERANCE[kind])
    return model


def _medians(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Seconds of each call; in turn, so that a machine that slows down slows all."""
    turns = [[seconds(_once(call), repeats=1, warm_up=0) for call in calls.values()] for _ in range(repeats)]
    return {name: median(times) for name, times in zip(calls, zip(*turns, strict=True), strict=True)}


def _once(call: Call) -> Callable[[int], object]:
    return lambda _: call()
