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


def _repair_bf16() -> None:
    """Triton's interpreter keeps bf16 as bit patterns, rounds towards zero and multiplies the patterns in tiles."""
    interpreter, language = import_module("triton.runtime.interpreter"), import_module("triton.language")
    create_dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def widen(x):
        if x.dtype.scalar != language.bfloat16:
            return x
        wide = torch.from_numpy(x.data.view("int16")).view(torch.bfloat16).float()
        return interpreter.TensorHandle(wide.numpy(), language.float32)

    def dot_of_numbers(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    def nearest(x, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) != (language.float32, language.bfloat16):
            return convert(x, input_dtype, output_dtype, rounding_mode)
        bits = x.astype("float32").reshape(-1)
        return torch.from_numpy(bits).bfloat16().view(torch.int16).numpy().view("uint16").reshape(x.shape)

    interpreter.InterpreterBuilder.create_dot = dot_of_numbers
    interpreter._convert_float = nearest


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    backends.BACKENDS = tuple(
        replace(backend, devices=("cpu",)) if backend.name == "triton" else backend for backend in backends.BACKENDS
    )
    _repair_bf16()


def device_of(backend: str | None) -> str:
    """The device type that tests of `backend` use."""
    on_gpu = backend in ("triton", "fla") and not INTERPRETED and torch.cuda.is_available()
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
