"""Products and decode steps: native kernels against torch and against this machine's own read bandwidth."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from spikingbrain_kernels import Slots, gated_linear, linear, pack, spike_linear, window_attention

from . import Row, read_bandwidth, require_close, seconds

# [out, in] of the 0.5B and 7B shapes' feed-forward halves.
SHAPES = ((4864, 896), (896, 4864), (18944, 3584), (3584, 18944))
SILENT = (0.0, 0.5, 0.7, 0.9)
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 1e-5}
POOL_BYTES = 400 << 20  # so much that nothing stays in a cache from call to call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--repeats N"""
    parser.add_argument("--repeats", type=int, default=30, help="calls timed")


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Row]:
    """A row for each shape, kind of weights and fraction of silent channels."""
    roof = read_bandwidth()
    rows: list[Row] = [{"op": "read", "shape": "1 GiB", "GB/s": roof / 1e9}]
    for shape in SHAPES:
        for kind in ("fp32", "bf16", "int8"):
            rows += _products(shape, kind, roof, args.repeats)
    return rows + _steps(roof, args.repeats)


def _products(shape: tuple[int, int], kind: str, roof: float, repeats: int) -> list[Row]:
    first = pack(torch.randn(shape), kind)
    weights = [first, *(pack(torch.randn(shape), kind) for _ in range(POOL_BYTES // first.nbytes))]
    inputs = [torch.randn(1, shape[1]) for _ in range(8)]
    error = require_close("linear", linear(inputs[0], first), linear(inputs[0], first, backend="reference"), 1e-5)
    common = {"shape": "x".join(map(str, shape)), "weights": kind}

    def row(op: str, call: Callable[[int], Any], **more: Any) -> Row:
        took = seconds(call, repeats=repeats)
        speed = first.nbytes / took
        return {"op": op, **common, "us": took * 1e6, "GB/s": speed / 1e9, "of roof": speed / roof, **more}

    rows = [row("linear", lambda i: linear(inputs[i % 8], weights[i % len(weights)]), error=error)]
    if kind != "int8":
        dense = [weight.dense()[0].contiguous() for weight in weights]
        rows.append(row("torch", lambda i: torch_linear(inputs[i % 8].to(dense[0].dtype), dense[i % len(dense)])))
    one = torch.ones(1, 1)
    for silent in SILENT:
        counts = [_counts(shape[1], silent) for _ in range(8)]
        expected = spike_linear(counts[0], one, first, backend="reference")
        error = require_close("spike_linear", spike_linear(counts[0], one, first), expected, TOLERANCE[kind])
        call = _spiking(counts, one, weights)
        rows.append(row("spike_linear", call, silent=silent, error=error))
    return rows


def _spiking(counts: list[Tensor], scale: Tensor, weights: list[Any]) -> Callable[[int], Tensor]:
    return lambda i: spike_linear(counts[i % 8], scale, weights[i % len(weights)])


def _counts(channels: int, silent: float) -> Tensor:
    """Counts of which exactly this part is zero."""
    counts = torch.randint(1, 9, (1, channels)) * (torch.randint(0, 2, (1, channels)) * 2 - 1)
    counts[0, torch.randperm(channels)[: round(silent * channels)]] = 0
    return counts.float()


def _steps(roof: float, repeats: int) -> list[Row]:
    """One token of 64 sequences of the 7B shape; recurrent states are in fp32 for bf16 too.

    Each call takes other sequences of a pool, until `POOL_BYTES` were touched: no cache holds a state until it is next.
    """
    batch, heads, groups, width, window = 64, 28, 4, 128, 1024
    decay = -torch.rand(batch, 1, groups, width)
    pool, ring = (_pool(batch, *sizes) for sizes in ((groups, width, width), (window, 2, groups, width)))
    positions, shape = torch.full((batch, 1), window), f"{batch} sequences of 7B"
    rows: list[Row] = []
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        q, k, v = (torch.randn(batch, 1, n, width).to(dtype) for n in (heads, groups, groups))
        linear = partial(gated_linear, q, k, v, decay, scale=1.0)
        attention = partial(window_attention, q, k, v, window=window, positions=positions)
        for op, call, state in (("gated_linear", linear, pool), ("window_attention", attention, ring.to(dtype))):
            parts = [Slots(state, slots) for slots in torch.randperm(len(state)).split(batch)]
            moved = state[:batch].nbytes * (2 if op == "gated_linear" else 1)
            for name, took, error in _step(op, call, parts, TOLERANCE[kind], repeats):
                speed = moved / took
                figures = {"us": took * 1e6, "GB/s": speed / 1e9, "of roof": speed / roof, "error": error}
                rows.append({"op": f"{op} step, {name}", "shape": shape, "inputs": kind, **figures})
    return rows


def _pool(batch: int, *sizes: int) -> Tensor:
    """States of these sizes, `POOL_BYTES` of them but at least a batch."""
    batches = max(1, POOL_BYTES // (4 * batch * prod(sizes)))
    return torch.randn(batches * batch, *sizes)


def _step(
    op: str, call: Callable[..., Any], states: list[Slots], tolerance: float, repeats: int
) -> Iterator[tuple[str, float, float]]:
    """Each backend's name, its time and the native one's error."""
    expected = call(state=states[0].read(), backend="reference")[0]
    error = require_close(op, call(state=states[0], backend="native")[0], expected, tolerance)
    for name, times in (("native", repeats), ("chunked", max(5, repeats // 6))):
        yield name, seconds(_again(call, states, name), repeats=times), error


def _again(call: Callable[..., Any], states: list[Slots], backend: str) -> Callable[[int], Any]:
    return lambda i: call(state=states[i % len(states)], backend=backend)
