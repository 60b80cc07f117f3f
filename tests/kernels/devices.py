"""Where each backend is tested: GPU kernels on a GPU, or on the CPU if Triton runs them in its interpreter."""

import os
from dataclasses import replace
from importlib import import_module

import torch

backends = import_module("spikingbrain_kernels.backends")


def _multiply_bf16_as_numbers() -> None:
    """Triton's interpreter keeps bf16 as bit patterns, and would multiply those in a product of tiles."""
    interpreter, language = import_module("triton.runtime.interpreter"), import_module("triton.language")
    numpy = import_module("numpy")
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != language.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), language.float32)

    def repaired(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = repaired


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    backends.BACKENDS = tuple(
        replace(backend, devices=("cpu",)) if backend.name == "triton" else backend for backend in backends.BACKENDS
    )
    _multiply_bf16_as_numbers()


def device_of(backend: str | None) -> str:
    """The device type that tests of `backend` use."""
    on_gpu = backend in ("triton", "fla") and not INTERPRETED and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"
