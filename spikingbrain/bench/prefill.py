"""Tokens a second of a prompt read at once: packed in fp32 and bf16; Qwen2 beside them."""

import argparse
from statistics import median
from typing import Any

import torch

from ..model import SpikingBrainForCausalLM
from ..packing import prepare
from ..state import StatePool
from . import Row, require_close, seconds
from .models import ours, qwen2

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model CONFIG --layers N --dtypes fp32 ... --lengths N ... --peer-up-to N --repeats N --chunk N"""
    parser.add_argument("--model", default="configs/models/qwen2.5-0.5b-shape.json", help="config file of the shape")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096], help="tokens of the prompt")
    parser.add_argument("--peer-up-to", type=int, default=4096, help="Qwen2 reads no longer prompt (square)")
    parser.add_argument("--repeats", type=int, default=3, help="prompts timed, of which the median is shown")
    parser.add_argument("--chunk", type=int, default=512, help="tokens a step of ours")


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Row]:
    """A row for each model and length."""
    rows: list[Row] = []
    for dtype in args.dtypes:
        model = ours(args.model, dtype, args.layers)
        expected = read(model, 70, args.chunk)
        prepare(model, dtype)
        require_close(f"the model in {dtype}", read(model, 70, args.chunk), expected, TOLERANCE[dtype])
        peer = qwen2(model.config, dtype)
        for length in args.lengths:
            tokens = torch.randint(0, model.config.vocab_size, (1, length))
            calls = {dtype: lambda _, model=model, length=length: read(model, length, args.chunk)}
            if length <= args.peer_up_to:
                calls[f"Qwen2 {dtype}"] = lambda _, peer=peer, tokens=tokens: peer(tokens, logits_to_keep=1)
            # In turn, so that a machine that slows down slows both.
            turns = [[seconds(call, repeats=1, warm_up=0) for call in calls.values()] for _ in range(args.repeats)]
            for name, times in zip(calls, zip(*turns, strict=True), strict=True):
                took = median(times)
                rows.append({"model": name, "tokens": length, "s": took, "tokens/s": length / took})
        del model, peer
    return rows


def read(model: SpikingBrainForCausalLM, length: int, chunk: int) -> Any:
    """The logits after a prompt, read in chunks over a pool as the engine does."""
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, length))
    pool = StatePool(model.state_specs(), 1, "cpu")
    slot = pool.allocate()
    for start, part in zip(range(0, length, chunk), tokens.split(chunk, 1), strict=True):
        positions = torch.arange(start, start + part.shape[1])[None]
        hidden, _ = model.step(part, pool.states(torch.tensor([slot])), positions=positions)
    return model.lm_head(hidden[:, -1])
