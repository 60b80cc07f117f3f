"""One CUDA GPU, the 7B shape: kernels against fp64, decoding in a CUDA graph, prompts up to a million tokens in bf16.

The softmax model of the same sizes is measured on a few layers and scaled; its longest prompt is fitted. What needs a
package that is not here is skipped by name.
"""

import argparse
import copy
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from spikingbrain_kernels import gated_delta, gated_linear, pack, spike_linear, window_attention, wkv
from spikingbrain_kernels.backends import backends

from ..errors import InputError
from ..packing import prepare
from ..state import StatePool
from . import Row, require_close
from .models import ADAPTIVE, ours, packed_bytes, qwen2, read

DEVICE = "cuda"
HEADS, GROUPS, WIDTH = 28, 4, 128
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
PEER = "Qwen2, softmax"
Call = Callable[[str, Callable[[Tensor], Tensor]], Tensor]
OPTIONAL = {"fla": "flash-linear-attention: pip install 'spikingbrain[cuda]'"}


def machine() -> str:
    """The GPU, as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model CONFIG --layers N --batch N --lengths N ... --peer-lengths N ... --peer-layers N --chunk N"""
    parser.add_argument("--model", default="configs/models/spikingbrain-7b-shape.json", help="config file of the shape")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--batch", type=int, default=64, help="sequences of the decode step")
    parser.add_argument("--chunk", type=int, default=16384, help="tokens of a prompt read at once")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << n for n in (14, 16, 17, 18, 19, 20)])
    parser.add_argument("--peer-lengths", type=int, nargs="+", default=[1 << n for n in (17, 18, 19)])
    parser.add_argument("--peer-layers", type=int, default=4, help="layers of the softmax model")


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Row]:
    """Rows of every part; raises `InputError` where there is no CUDA device, `ResultsDiffer` for wrong kernels."""
    if not torch.cuda.is_available():
        raise InputError("bench gpu needs a CUDA device, and torch finds none here")
    torch.manual_seed(0)
    rows: list[Row] = [{"what": torch.cuda.get_device_name(), "torch": torch.__version__}, *kernel_rows(DEVICE)]
    rows += _chunk_rows(args.chunk)
    roof = _bandwidth()
    rows.append({"what": "memory read", "GB/s": roof / 1e9})
    with torch.device(DEVICE):
        spiking = prepare(ours(args.model, "bf16", args.layers, spiking=ADAPTIVE), "int8")
    rows.append(_decode_row("int8 with spikes", spiking, args.batch, roof))
    del spiking
    with torch.device(DEVICE):
        model = ours(args.model, "bf16", args.layers)
    rows.append(_decode_row("bf16", model, args.batch, roof))
    prompts = {length: _prompt(model.config, length) for length in args.lengths}
    read(model, _prompt(model.config, args.chunk), args.chunk)  # compiles what the first would otherwise wait for
    mine = {n: _seconds(partial(read, model, tokens, args.chunk), repeats=1) for n, tokens in prompts.items()}
    rows += [
        {"what": "prompt", "tokens": length, "s": took, "tokens/s": length / took} for length, took in mine.items()
    ]
    layers, config = model.config.num_hidden_layers, model.config
    del model
    torch.cuda.empty_cache()
    softmax = _softmax_times(config, args.peer_layers, args.peer_lengths)
    return rows + first_token_rows(mine, softmax, args.peer_layers, layers)


def kernel_rows(device: str) -> list[Row]:
    """The error of each Triton kernel, for inputs in fp32 and bf16, against the reference in fp64."""
    rows: list[Row] = []
    for dtype, tolerance in TOLERANCE.items():
        for name, call in _calls(dtype, device).items():
            error = require_close(name, call("triton", lambda x: x), call("reference", _double), tolerance)
            rows.append({"what": name, "inputs": str(dtype).removeprefix("torch."), "error": error})
    return rows


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _calls(dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Calls `(backend, cast of the inputs)` of the ops on inputs of `dtype`."""
    packed, scale = pack(torch.randn(640, 512, device=device), "int8"), torch.rand(9, 1, device=device)
    counts = torch.randint(-9, 10, (9, 512), device=device).to(dtype)
    calls: dict[str, Call] = {
        "spike_linear, int8": lambda name, cast: spike_linear(cast(counts), scale, packed, backend=name)
    }
    for length in (1, 50):
        calls |= {f"{op}, {length} tokens": call for op, call in _recurrent_calls(length, dtype, device).items()}
    return calls


def _recurrent_calls(length: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    q, k, v = (torch.randn(2, length, n, WIDTH, device=device).to(dtype) for n in (HEADS, GROUPS, GROUPS))
    k = (k / k.norm(dim=-1, keepdim=True)).to(dtype)
    decay, beta = -torch.rand(2, length, GROUPS, WIDTH, device=device), torch.rand(2, length, GROUPS, 1, device=device)
    x, channel = torch.randn(2, length, 300, device=device).to(dtype), torch.randn(300, device=device)
    positions = torch.arange(length, device=device).expand(2, -1)
    scale = WIDTH**-0.5
    linear, delta, channels = (q, k, v, decay), (q, k, v, beta, decay[..., :1]), (x, x, channel, channel)
    return {
        "gated_linear": lambda name, cast: gated_linear(*map(cast, linear), scale=scale, backend=name)[0],
        "gated_linear's gradients": lambda name, cast: gradients([*map(cast, linear)], name),
        "gated_delta": lambda name, cast: gated_delta(*map(cast, delta), scale=scale, backend=name)[0],
        "wkv": lambda name, cast: wkv(*map(cast, channels), backend=name)[0],
        "window_attention": lambda name, cast: window_attention(
            *map(cast, (q, k, v)), window=30, positions=positions, backend=name
        )[0],
    }


def _seconds(call: Callable[[], object], *, repeats: int) -> float:
    """The median time of `call()` on the GPU, after one that is not counted where there are several."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


def _bandwidth(size: int = 4 << 30) -> float:
    """Bytes a second read from the GPU's memory: the best of ten sums over `size` bytes."""
    memory = torch.ones(size // 4, device=DEVICE)
    return size / min(_seconds(memory.sum, repeats=3) for _ in range(10))


def _chunk_rows(length: int) -> list[Row]:
    """A prompt of one layer, read and learned from: heads in groups, and FLA on what they share, repeated."""
    inputs = [torch.randn(1, length, n, WIDTH, device=DEVICE, dtype=torch.bfloat16) for n in (HEADS, GROUPS, GROUPS)]
    inputs.append(-torch.rand(1, length, GROUPS, WIDTH, device=DEVICE))
    rows: list[Row] = []
    for backend in backends("gated_linear"):
        if DEVICE not in backend.devices or backend.name == "reference":
            continue
        if any(find_spec(package) is None for package in backend.requires):
            rows.append({"what": f"chunks, {backend.name}: needs {OPTIONAL.get(backend.name, backend.name)}, skipped"})
            continue
        calls = {
            "chunks": partial(gated_linear, *inputs, scale=WIDTH**-0.5, backend=backend.name),
            "chunks and gradients": partial(gradients, inputs, backend.name),
        }
        for what, call in calls.items():
            rows.append(
                {"what": what, "backend": backend.name, "tokens": length, "us": _seconds(call, repeats=10) * 1e6}
            )
    ours = {row["what"]: row["us"] for row in rows if row.get("backend") == "triton"}
    return [{**row, "of triton": row["us"] / ours[row["what"]]} if "us" in row else row for row in rows]


def gradients(inputs: Sequence[Tensor], backend: str) -> Tensor:
    """Gradients of `gated_linear`'s inputs where those of its outputs are ones, one after another."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, _ = gated_linear(*leaves, scale=WIDTH**-0.5, backend=backend)
        return torch.cat([x.flatten() for x in torch.autograd.grad(out.sum(), leaves)])


def _decode_row(name: str, model: Any, batch: int, roof: float) -> Row:
    """One token of `batch` sequences with full windows, in a CUDA graph, their slots in no order."""
    step = decoder(model, batch)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    took = _seconds(graph.replay, repeats=30)
    moved = moved_bytes(model, batch)
    return {
        "what": f"decode step, {name}, batch {batch}",
        "ms": took * 1e3,
        "tokens/s": batch / took,
        "GB/s": moved / took / 1e9,
        "of read roof": moved / took / roof,
    }


def decoder(model: Any, batch: int) -> Callable[[], Tensor]:
    """The step that gives the logits of one token more, over a pool of states as after two windows of tokens."""
    device = model.device
    pool = StatePool(model.state_specs(), batch, device)
    slots = [pool.allocate() for _ in range(batch)]
    states = pool.states(torch.tensor(slots)[torch.randperm(batch, device="cpu")].to(device))
    for layer in states:
        values: list[Any] = list(layer.values())
        for state in values:
            state.pool.normal_(std=0.1)
    tokens = torch.full((batch, 1), 5, device=device)
    positions = torch.full((batch, 1), 2 * model.config.window, device=device)

    def step() -> Tensor:
        hidden, _ = model.step(tokens, states, positions=positions)
        return model.lm_head(hidden[:, -1])

    return step


def moved_bytes(model: Any, batch: int) -> int:
    """Bytes that a decode step cannot do without: weights once, rings read, recurrent states read and written."""
    weights = sum(parameter.nbytes for parameter in model.parameters()) + packed_bytes(model)
    embedding = model.get_input_embeddings().weight
    if getattr(model.lm_head, "weight", None) is not embedding:
        weights -= embedding.nbytes
    times = {"recurrent": 2, "conv": 2, "ring": 1, "growing": 1}
    specs = [spec for layer in model.state_specs() for spec in layer]
    states = sum(spec.allocate(1, "meta").nbytes * times[spec.kind] for spec in specs)
    return weights + batch * states


def _prompt(config: Any, length: int) -> Tensor:
    return torch.randint(0, config.vocab_size, (1, length), device=DEVICE)


def _softmax_times(config: Any, layers: int, lengths: list[int]) -> dict[int, float | None]:
    """Seconds of a prompt for the softmax model with so many layers; None where memory did not suffice."""
    small = copy.copy(config)
    small.num_hidden_layers = layers
    with torch.device(DEVICE):
        peer = qwen2(small, "bf16")
    times: dict[int, float | None] = {}
    for length in lengths:
        tokens = _prompt(config, length)
        try:
            times[length] = _seconds(partial(peer, tokens, logits_to_keep=1), repeats=3)
        except torch.OutOfMemoryError:
            times[length] = None
        torch.cuda.empty_cache()
    return times


def first_token_rows(
    mine: dict[int, float], softmax: dict[int, float | None], measured_layers: int, layers: int
) -> list[Row]:
    """Time to first token at our lengths from the softmax model's shortest on: measured and scaled, or fitted."""
    rows: list[Row] = [
        {"what": PEER, "tokens": n, "softmax from": "out of memory"} for n, took in softmax.items() if took is None
    ]
    scaled = {n: took * layers / measured_layers for n, took in softmax.items() if took is not None}
    if len(scaled) < 2:
        return [*rows, {"what": f"{PEER}: fewer than two lengths measured, not fitted"}]
    for length, took in mine.items():
        if length < min(scaled):
            continue
        origin = f"{measured_layers} layers, scaled" if length in scaled else f"fitted to {len(scaled)} lengths"
        theirs = scaled.get(length) or fitted(scaled, length)
        figures = {"s": took, "softmax s": theirs, "softmax / ours": theirs / took}
        rows.append({"what": "time to first token", "tokens": length, **figures, "softmax from": origin})
    return rows


def fitted(times: dict[int, float], length: int) -> float:
    """a n + b n^2 at n = `length`, a and b fitted to `times` by least squares of the relative error."""
    lengths = torch.tensor(list(times), dtype=torch.float64)
    seconds = torch.tensor(list(times.values()), dtype=torch.float64)
    terms = torch.stack([lengths, lengths**2], dim=1)
    solution = torch.linalg.lstsq(terms / seconds[:, None], torch.ones_like(seconds)[:, None]).solution[:, 0]
    return float(solution[0] * length + solution[1] * length**2)
