"""Tokens a second of one sequence at several positions: packed in bf16, int8, with spikes; a Qwen2 beside them.

Ours and reading of memory take turns, token by token, as a shared machine reads at one rate now and at another a second
later. The Qwen2 then runs in Hugging Face's library and, where these are installed, in llama.cpp and vLLM, whose
threads would disturb the others; between its tokens it waits, so that they are spread over as long a time.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..packing import prepare
from . import READ, Row, reading, require_close, seconds_in_turn
from .models import ADAPTIVE, OurDecoder, TheirDecoder, first_logits, ours, packed_bytes, qwen2, silence
from .peers import LlamaCpp, Vllm, lacking

WARM_UP = 2
# Between tokens of a peer: what a token of each of ours takes.
PAUSE = 0.25
TOLERANCE = {"bf16": 5e-2, "int8": 0.15, "q8_0": 0.15}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model CONFIG --positions N ... --tokens N"""
    parser.add_argument("--model", default="configs/models/qwen2.5-0.5b-shape.json", help="config file of the shape")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 4096, 65536], help="tokens read before")
    parser.add_argument("--peer-positions", type=int, nargs="+", default=[512, 4096], help="the same for the peers")
    parser.add_argument("--tokens", type=int, default=32, help="tokens timed")


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Row]:
    """A row for each model and position."""
    models = list(_models(args))
    config = models[0][1].config
    rows = list(_in_turn(models, args))
    roof = rows[0]["GB/s"] * 1e9
    del models
    rows += _hugging_face("fp32", qwen2(config, "fp32"), roof, args)
    peer = qwen2(config, "bf16")
    rows += _hugging_face("bf16", peer, roof, args)
    for name, rows_of in (("llama.cpp", _llama_cpp), ("vLLM", _vllm)):
        missing = lacking(name)
        rows += [{"model": f"{name}: {', '.join(missing)} not installed"}] if missing else rows_of(peer, roof, args)
    return rows


def _in_turn(models: list[tuple[str, Any, int]], args: argparse.Namespace) -> Iterator[Row]:
    turns = [
        (name, position, size, OurDecoder(model, position))
        for name, model, size in models
        for position in args.positions
    ]
    calls = [lambda _, call=call: call() for *_, decoder in turns for call in (decoder.advance, decoder.step)]
    read, *times = seconds_in_turn([reading(), *calls], repeats=args.tokens, warm_up=WARM_UP)
    roof = READ / read
    yield {"model": "read bandwidth", "GB/s": roof / 1e9}
    for (name, position, size, decoder), took in zip(turns, times[1::2], strict=True):
        row, outside = _figures(name, position, size, roof, took), decoder.seconds_outside()
        yield row if outside is None else row | {"outside kernels ms": outside * 1e3}


def _hugging_face(dtype: str, model: Any, roof: float, args: argparse.Namespace) -> Iterator[Row]:
    for position in args.peer_positions:
        decoder = TheirDecoder(model, position)
        yield _row(f"Qwen2 {dtype}", decoder, position, bytes_of(model), roof, args.tokens)


def bytes_of(model: Any) -> int:
    """Bytes of all weights of a model that is not packed."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _llama_cpp(model: Any, roof: float, args: argparse.Namespace) -> Iterator[Row]:
    text = list(range(5, 12))
    expected = model(torch.tensor([text])).logits[0, -1]
    for kind, bits in (("bf16", 16), ("q8_0", 8.5)):
        peer = LlamaCpp(model, kind, max(args.peer_positions) + len(text) + 2 * (WARM_UP + args.tokens))
        require_close(f"llama.cpp in {kind}", peer.read(text), expected, TOLERANCE[kind])
        size = bytes_of(model) / 16 * bits
        for position in sorted(args.peer_positions):
            peer.go_to(position)
            yield _row(f"llama.cpp {kind}", peer, position, size, roof, args.tokens)
        peer.close()


def _vllm(model: Any, roof: float, args: argparse.Namespace) -> Iterator[Row]:
    peer = Vllm(model, max(args.peer_positions))
    for position in args.peer_positions:
        yield _figures("vLLM bf16", position, bytes_of(model), roof, peer.seconds_a_token(position))


def _models(args: argparse.Namespace) -> Iterator[tuple[str, Any, int]]:
    dense = ours(args.model, "bf16", args.layers)
    expected = first_logits(dense)
    for kind in ("bf16", "int8"):
        packed = prepare(copy.deepcopy(dense), kind)
        require_close(f"the model in {kind}", first_logits(packed), expected, TOLERANCE[kind])
        yield kind, packed, packed_bytes(packed)
    for head, silent in ((False, 0.0), (False, 0.7), (True, 0.7)):
        spiking = prepare(ours(args.model, "bf16", args.layers, spiking={**ADAPTIVE, "head": head}), "int8")
        name = f"int8, spikes, {silent:.0%} silent" + (", before the head too" if head else "")
        yield name, silence(spiking, silent), packed_bytes(spiking)


def _row(name: str, decoder: Any, position: int, weight_bytes: float, roof: float, tokens: int) -> Row:
    def wait(_: int) -> None:
        time.sleep(PAUSE)
        decoder.step()  # not timed: the first after a pause may be slow

    _, took = seconds_in_turn([wait, lambda _: decoder.step()], repeats=tokens, warm_up=WARM_UP)
    return _figures(name, position, weight_bytes, roof, took)


def _figures(name: str, position: int, weight_bytes: float, roof: float, took: float) -> Row:
    figures = {"ms": took * 1e3, "tokens/s": 1 / took, "weights GB": weight_bytes / 1e9}
    return {"model": name, "position": position, **figures, "weights/read roof": weight_bytes / roof / took}
