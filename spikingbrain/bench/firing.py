"""Tokens a second of one sequence at a large shape whose channels fire as a trained model's do; dense int8 beside it.

Counts are recorded token by token. A wider layer takes those of the recorded layer of the same kind at the nearest
relative depth: its channels are the quantiles, by how often a channel fires, of the recorded ones, and lie where these
do: a rotated model's largest channels come first. A token's counts stay together, so what fires together in the
recording does so here, and so does a token's share.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from spikingbrain_kernels.packed import GROUP

from ..checkpoint import load_model, load_tokenizer
from ..errors import InputError
from ..evaluation import pieces, text_files
from ..files import read_json
from ..packing import prepare
from ..spiking import encoders, record_spikes, weights_read_by
from . import Row, require_close, seconds
from .decode import TOLERANCE
from .models import OurDecoder, first_logits, ours, packed_bytes, replay, silence

CONTEXT = 256
# The first tokens of a piece have read too little to fire as later ones do.
SKIPPED = 64
PASSES = 10
LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--recorded DIR ... --text PATH ... --model CONFIG --tokens N"""
    parser.add_argument("--recorded", nargs="+", required=True, metavar="DIR", help="trained spiking model directories")
    parser.add_argument("--text", nargs="+", required=True, metavar="PATH", help="text files, or directories of them")
    parser.add_argument("--glob", default="*", help="which files of a directory")
    parser.add_argument("--model", default="configs/models/qwen2.5-0.5b-shape.json", help="config file of the shape")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--position", type=int, default=512, help="tokens read before")
    parser.add_argument("--tokens", type=int, default=24, help="tokens timed, and recorded")


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Row]:
    """A row for the dense path, one for spikes of which none is silent, and one for each recorded model."""
    models = list(_models(args))
    decoders = [OurDecoder(model, args.position) for _, model, _ in models]
    # Passes through all recorded tokens, so that none is left out; the first is not counted.
    passes = [[_a_token(decoder, args.tokens) for decoder in decoders] for _ in range(PASSES + 1)]
    times = [sorted(own)[PASSES // 10] for own in zip(*passes[1:], strict=True)]
    rows = []
    for (name, model, unread), took in zip(models, times, strict=True):
        row = {"model": name, "ms": took * 1e3, "tokens/s": 1 / took, "weights GB": packed_bytes(model) / 1e9}
        rows.append(row if unread is None else row | {"weights unread": unread, "times dense": times[0] / took})
    return rows


def _a_token(decoder: OurDecoder, tokens: int) -> float:
    """The mean time of one of so many tokens."""
    took = []
    for _ in range(tokens):
        decoder.advance()
        took.append(seconds(lambda _: decoder.step(), repeats=1, warm_up=0))
    return mean(took)


def _models(args: argparse.Namespace) -> Iterator[tuple[str, Any, float | None]]:
    """Names, models, and the share of weights that the recorded ones leave out."""
    yield "int8, dense", prepare(ours(args.model, "bf16", args.layers), "int8"), None
    files = text_files(args.text, args.glob)
    for number, path in enumerate(args.recorded):
        spiking = _spiking(path)
        if number == 0:
            model = prepare(ours(args.model, "bf16", args.layers, spiking=spiking), "int8")
            yield f"int8, {spiking['neuron']}, none silent", silence(model, 0.0), None
        model = ours(args.model, "bf16", args.layers, spiking=spiking)
        counts = stretch(record(path, files, args.tokens), model)
        share = unread_weights(model, counts)
        expected = first_logits(replay(model, counts))
        prepare(model, "int8")
        require_close(f"the model firing as {path}", first_logits(replay(model, counts)), expected, TOLERANCE["int8"])
        yield f"int8, firing as {_name(path)}", replay(model, counts), share


def _spiking(path: str) -> dict[str, Any]:
    spiking = read_json(Path(path) / "config.json").get("spiking")
    if not spiking:
        raise InputError(f"{path} has no spikes to record")
    return spiking


def _name(path: str) -> str:
    """A run's name rather than that of the folder in it."""
    place = Path(path)
    return place.parent.name if place.name == "model" else place.name


def record(path: str, files: list[Path], tokens: int) -> dict[str, Tensor]:
    """Counts `[tokens, C]` of every encoder of the model in `path` at tokens spread over the texts."""
    model, tokenizer = load_model(path), load_tokenizer(path)
    tokenizer.model_max_length = int(1e9)
    rows = list(pieces(tokenizer, files, CONTEXT, -(-tokens // 8) * CONTEXT))
    if not rows:
        raise InputError(f"no document has {CONTEXT + 1} tokens")
    with record_spikes(model) as recorded:
        model(input_ids=torch.stack(rows)[:, :-1], use_cache=False)
    later = {name: calls[0][:, SKIPPED:].flatten(0, 1) for name, calls in recorded.counts.items()}
    return {name: counts[:: max(1, len(counts) // tokens)][:tokens] for name, counts in later.items()}


def stretch(recorded: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The counts that each encoder of the wider, deeper `model` fires, from those `recorded`; see the module."""
    places, generator = _places(recorded), torch.Generator().manual_seed(0)
    result = {}
    for name, (kind, depth) in _places(encoders(model)).items():
        like = {other: abs(place - depth) for other, (same, place) in places.items() if same == kind}
        if not like:
            raise InputError(f"nothing was recorded that {name} could fire like")
        source = recorded[min(like, key=lambda other: like[other])]
        result[name] = quantiles(source, model.get_submodule(name).neuron.channels, generator)
    return result


def _places(names: Iterable[str]) -> dict[str, tuple[str, float]]:
    """The kind of each encoder and its relative depth; one outside the layers is a kind of its own."""
    found = {name: LAYER.search(name) for name in names}
    layers = 1 + max(int(match[1]) for match in found.values() if match)
    return {n: (m[2], (int(m[1]) + 0.5) / layers) if m else (n, 1.0) for n, m in found.items()}


def quantiles(counts: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """`counts [N, C]` at `width` channels: evenly spaced quantiles of the firing frequency, in the channels' order.

    Within a group of weights the order is random: copies of a channel side by side would be one long run of weights.
    """
    order = (counts != 0).float().mean(0).argsort()
    chosen = order[((torch.arange(width) + 0.5) * (len(order) / width)).long()].sort().values
    shuffled = [group[torch.randperm(len(group), generator=generator)] for group in chosen.split(GROUP)]
    return counts[:, torch.cat(shuffled)]


def unread_weights(model: Any, counts: dict[str, Tensor]) -> float:
    """The share of the spiking projections' weights that need not be read."""
    sizes = weights_read_by(model)
    unread = sum(size * float((counts[name] == 0).float().mean()) for name, size in sizes.items())
    return unread / sum(sizes.values())
