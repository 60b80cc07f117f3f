"""Where each backend is tested: GPU kernels on a GPU, or on the CPU if Triton interprets them; chunks and threads."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor

backends = import_module("spikingbrain_kernels.backends")

Op = Callable[[Sequence[Tensor], int, Tensor], tuple[Tensor, Tensor]]


ON_A_GPU = ("triton", "fla")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter = import_module("interpreter")
    interpreter.repair_bf16()
    interpreter.stand_in_for_a_gpu()
    backends.BACKENDS = tuple(
        replace(backend, devices=("cpu",)) if backend.name in ON_A_GPU else backend for backend in backends.BACKENDS
    )


def device_of(backend: str | None) -> str:
    """The device type that tests of `backend` use."""
    on_gpu = backend in ON_A_GPU and not INTERPRETED and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Native kernels use so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_no_bit_depends_on(cuts: Sequence[tuple[int, Sequence[int]]], op: Op, x: Sequence[Tensor], state: Tensor):
    """`op(tokens of x, their first one's place, state)` gives the same in chunks of any sizes on any number of threads.

    `cuts` are numbers of threads and sizes of chunks.
    """
    whole = op(x, 0, state)
    for count, sizes in cuts:
        outs, after, start = [], state, 0
        with threads(count):
            for size in sizes:
                out, after = op([t[:, start : start + size] for t in x], start, after)
                outs.append(out)
                start += size
        assert torch.equal(torch.cat(outs, 1), whole[0])
        assert torch.equal(after, whole[1])
