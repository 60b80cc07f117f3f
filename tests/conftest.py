"""What all tests share: seeds, quiet uninitialised memory, the one way errors are measured, native kernels by level."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spikingbrain_kernels import library as native


def relative_rms(value: Tensor, reference: Tensor) -> float:
    """RMS(value - reference) / RMS(reference)."""
    difference = (value.double() - reference.double()).pow(2).mean().sqrt()
    return float((difference / (reference.double().pow(2).mean().sqrt() + 1e-12)).detach())


class Asks(TorchDispatchMode):
    """Collects what a CUDA graph cannot capture: values read on the host, sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in function.__name__ for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def at_level(name: str) -> Iterator[None]:
    """Native kernels are those of one instruction set."""
    before, native.LEVELS = native.LEVELS, (name,)
    native.library.cache_clear()
    try:
        yield
    finally:
        native.LEVELS = before
        native.library.cache_clear()


@pytest.fixture(params=native.levels() if native.missing() is None else [])
def level(request):
    """Every level this processor has, in turn, as the best one."""
    with at_level(request.param):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(42)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element nobody wrote fails the test that reads it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """Commands that the tests start can be interrupted, even where these tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
