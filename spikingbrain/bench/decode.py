"""Tokens a second of one sequence at several positions: packed in fp32, bf16, int8, with spikes; Qwen2 beside them."""

import argparse
import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from ..packing import prepare
from . import Row, read_bandwidth, require_close, seconds
from .models import ADAPTIVE, OurDecoder, TheirDecoder, ours, qwen2, silence

TOLERANCE = {"bf16": 5e-2, "int8": 0.15}
PEERS = {"llama_cpp": "llama.cpp", "vllm": "vLLM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model CONFIG --positions N ... --tokens N"""
    parser.add_argument("--model", default="configs/models/qwen2.5-0.5b-shape.json", help="config file of the shape")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 4096, 65536], help="tokens read before")
    parser.add_argument("--peer-positions", type=int, nargs="+", default=[512, 4096], help="the same for the peers")
    parser.add_argument("--tokens", type=int, default=12, help="tokens timed")


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Row]:
    """A row for each model and position."""
    roof = read_bandwidth()
    rows: list[Row] = [{"model": "read bandwidth", "GB/s": roof / 1e9}]
    for name, model, size in _models(args):
        config = model.config
        for position in args.positions:
            decoder = OurDecoder(model, position)
            outside = {"outside kernels ms": decoder.seconds_outside() * 1e3}
            rows.append(_row(name, decoder, position, size, roof, args.tokens) | outside)
    for dtype in ("bf16", "fp32"):
        peer = qwen2(config, dtype)
        size = sum(parameter.nbytes for parameter in peer.parameters())
        for position in args.peer_positions:
            rows.append(_row(f"Qwen2 {dtype}", TheirDecoder(peer, position), position, size, roof, args.tokens))
        del peer
    return rows + [{"model": f"{peer}: not installed"} for name, peer in PEERS.items() if find_spec(name) is None]


def _models(args: argparse.Namespace) -> Iterator[tuple[str, Any, int]]:
    dense = ours(args.model, "bf16", args.layers)
    expected = _logits(dense)
    for kind in ("bf16", "int8"):
        packed = prepare(copy.deepcopy(dense), kind)
        require_close(f"the model in {kind}", _logits(packed), expected, TOLERANCE[kind])
        yield kind, packed, packed_bytes(packed)
        del packed
    del dense
    spiking = prepare(ours(args.model, "bf16", args.layers, spiking=ADAPTIVE), "int8")
    for silent in (0.0, 0.7):
        yield f"int8, spikes, {silent:.0%} silent", silence(spiking, silent), packed_bytes(spiking)


def _logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return OurDecoder(model, 1).step()


def packed_bytes(model: Any) -> int:
    """Bytes of all packed weights: what a dense decode step reads."""
    return sum(module.packed.nbytes for module in model.modules() if hasattr(module, "by_name"))


def _row(name: str, decoder: Any, position: int, weight_bytes: int, roof: float, tokens: int) -> Row:
    took = seconds(lambda _: decoder.step(), repeats=tokens, warm_up=2)
    figures = {"ms": took * 1e3, "tokens/s": 1 / took, "weights GB": weight_bytes / 1e9}
    return {"model": name, "position": position, **figures, "weights/read roof": weight_bytes / roof / took}
