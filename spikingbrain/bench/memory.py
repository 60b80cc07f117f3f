"""Bytes of weights and of one sequence's state at several lengths; Qwen2's keys and values beside them."""

import argparse

import torch

from ..packing import prepare
from . import Row
from .models import ours, packed_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model CONFIG --lengths N ..."""
    parser.add_argument("--model", default="configs/models/qwen2.5-0.5b-shape.json", help="config file of the shape")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 65536, 1 << 20], help="tokens")


def run(args: argparse.Namespace) -> list[Row]:
    """A row for each kind of weights, then one for each length."""
    rows: list[Row] = []
    for kind in ("fp32", "bf16", "int8"):
        model = prepare(ours(args.model, "bf16", None), kind)
        rows.append({"what": f"weights packed in {kind}", "MB": packed_bytes(model) / 1e6})
    config = model.config
    state = sum(spec.allocate(1, "meta").nbytes for layer in model.state_specs() for spec in layer)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * torch.bfloat16.itemsize
    for length in args.lengths:
        rows.append({"what": "state in bf16", "tokens": length, "MB": state / 1e6})
        rows.append({"what": "Qwen2's cache in bf16", "tokens": length, "MB": per_token * length / 1e6})
    return rows
