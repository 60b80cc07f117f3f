"""Compile the Triton kernels for a GPU that need not be there: `python tests/kernels/compile_triton.py [CAPABILITY]`.

Calls ops on the CPU with every launch replaced by a compilation for that compute capability (90 by default), and fails
where a kernel does not compile or needs more shared memory than such a GPU has.
"""

import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import spikingbrain_kernels as kernels

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
HEADS, GROUPS, WIDTH = 28, 4, 128
COMPILE = JITFunction.run


class Compiler:
    """Compiles instead of launching, and remembers the shared memory of each kernel."""

    def __init__(self, capability):
        target = GPUTarget("cuda", capability, 32)
        names = {
            "get_current_target": target,
            "get_current_device": 0,
            "get_current_stream": 0,
            "get_active_torch_device": torch.device("cpu"),
        }
        driver.set_active(SimpleNamespace(**{name: partial(lambda value, *_: value, x) for name, x in names.items()}))
        self.limit = SHARED_MEMORY[capability]
        self.shared = {}

    def run(self, kernel, *args, grid, warmup, **options):  # noqa: ARG002
        compiled = COMPILE(kernel, *args, grid=grid, warmup=True, **options)
        self.shared[kernel.__name__, compiled.hash] = compiled.metadata.shared
        return compiled


def recurrent(dtype, length):
    """Every recurrent op over a pool; attention with sinks too, and everything with a mask."""
    q, k, v = (torch.randn(2, length, n, WIDTH).to(dtype) for n in (HEADS, GROUPS, GROUPS))
    decay, slots, mask = -torch.rand(2, length, GROUPS, WIDTH), torch.tensor([2, 1]), torch.ones(2, length).bool()
    positions, x = torch.zeros(2, length, dtype=torch.long), torch.randn(2, length, 512).to(dtype)
    state = {"pool": torch.zeros(4, GROUPS, WIDTH, WIDTH), "slots": slots, "backend": "triton"}
    ring = {**state, "pool": torch.zeros(4, 4096, 2, GROUPS, WIDTH, dtype=dtype), "positions": positions}
    for ragged in ({}, {"mask": mask}):
        kernels.gated_linear_step_(q, k, v, decay, scale=1.0, **state, **ragged)
        kernels.window_attention_step_(q, k, v, window=4096, sinks=torch.randn(3, 2, GROUPS, WIDTH), **ring, **ragged)
    kernels.window_attention_step_(q, k, v, window=4096, **ring)
    if length == 1:
        kernels.gated_delta_step_(q, k, v, -decay[..., :1], decay[..., :1], scale=1.0, **state)
    kernels.wkv(x, x, torch.randn(512), torch.randn(512), backend="triton")
    for v_reset in (None, 0.0):
        neuron = {"tau": 2.0, "v_th": 1.0, "v_reset": v_reset, "decay_input": v_reset is None}
        kernels.lif_scan(x, **neuron, backend="triton")
    kernels.short_conv(x, torch.randn(512, 4), backend="triton")


def learning(dtype, length):
    """The gradients of the ops that have them."""
    q, k, v = (torch.randn(2, length, n, WIDTH).to(dtype).requires_grad_() for n in (HEADS, GROUPS, GROUPS))
    decay = -torch.rand(2, length, GROUPS, WIDTH)
    for ragged in ({}, {"mask": torch.ones(2, length).bool()}):
        out, _ = kernels.gated_linear(q, k, v, decay, scale=1.0, backend="triton", **ragged)
        out.sum().backward()


def others(dtype, length):
    """Products with every kind of weights, and what is done element by element."""
    x, scale, weight = torch.randn(2, length, 512).to(dtype), torch.ones(2, length, 1), torch.ones(512)
    encoding = {"k": 3.0, "low": 1e-5, "high": 1e4, "backend": "triton"}
    kernels.rms_norm(x, weight, 1e-6, backend="triton")
    kernels.rms_norm_encode(x, weight, 1e-6, **encoding)
    kernels.encode_adaptive(x, **encoding)
    kernels.encode_dead_zone(x, weight, torch.ones(1), least_k=0.5, low=1e-5, high=1e4, backend="triton")
    kernels.swiglu(x, x, backend="triton")
    kernels.log_sigmoid(x, 16.0, backend="triton")
    heads, positions = x.view(2, length, 4, 128), torch.zeros(2, length, dtype=torch.long)
    kernels.rotary(heads, positions, torch.ones(64), 1.0, backend="triton")
    for kind in kernels.KINDS:
        packed = kernels.pack(torch.randn(640, 512), kind)
        kernels.linear(x, packed, backend="triton")
        kernels.spike_linear(x.round(), scale, packed, torch.ones(640), backend="triton")


def main() -> int:
    """Compile all; the exit status says whether all fits."""
    compiler = Compiler(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
    table = import_module("spikingbrain_kernels.backends")
    table.BACKENDS = tuple(replace(x, devices=("cpu",)) if x.name == "triton" else x for x in table.BACKENDS)
    with mock.patch.object(JITFunction, "run", lambda kernel, *args, **options: compiler.run(kernel, *args, **options)):
        for dtype in (torch.bfloat16, torch.float32):
            for length in (1, 200):
                recurrent(dtype, length)
                learning(dtype, length)
                others(dtype, length)
    largest = {}
    for (name, _), size in compiler.shared.items():
        largest[name] = max(size, largest.get(name, 0))
    for name, size in sorted(largest.items()):
        sys.stdout.write(f"{name:28} {size:7} bytes of shared memory\n")
    return int(max(largest.values()) > compiler.limit)


if __name__ == "__main__":
    sys.exit(main())
