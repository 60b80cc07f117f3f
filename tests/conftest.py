"""What all tests share: seeds, quiet uninitialised memory, and the one way errors are measured."""

import signal

import pytest
import torch
from torch import Tensor


def relative_rms(value: Tensor, reference: Tensor) -> float:
    """RMS(value - reference) / RMS(reference)."""
    difference = (value.double() - reference.double()).pow(2).mean().sqrt()
    return float((difference / (reference.double().pow(2).mean().sqrt() + 1e-12)).detach())


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
