"""The one table of backends: which function serves which op on which device, and what to install for those missing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

Op = Callable[..., Any]


class BackendError(ValueError):
    """An unknown op or backend, or one that cannot run here; the message names the choices."""


@dataclass(frozen=True)
class Backend:
    """A module of this package with one function per op, the device types it runs on and the packages it needs."""

    name: str
    devices: tuple[str, ...]
    ops: tuple[str, ...]
    requires: tuple[str, ...] = ()
    extra: str = ""

    def missing(self, device: str) -> str | None:
        """Why it cannot run on `device`, or None if it can."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        absent = [package for package in self.requires if find_spec(package) is None]
        if absent:
            return f"needs {', '.join(absent)}: pip install 'spikingbrain[{self.extra}]'"
        return None

    def load(self, op: str) -> Op:
        """The function that serves `op`."""
        return getattr(import_module(f"spikingbrain_kernels.{self.name}"), op)


OPS = ("gated_linear", "gated_delta", "wkv", "lif_scan", "short_conv", "window_attention")
ANY_DEVICE = ("cpu", "cuda", "meta")

# In order of preference.
BACKENDS = (
    Backend("chunked", ANY_DEVICE, OPS),
    Backend("reference", ANY_DEVICE, OPS),
)


def backends(op: str) -> tuple[Backend, ...]:
    """Every backend that has `op`, best first; raises `BackendError` for an unknown op."""
    if op not in OPS:
        raise BackendError(f"unknown op {op!r}; choose from {', '.join(OPS)}")
    return tuple(backend for backend in BACKENDS if op in backend.ops)


@cache
def resolve(op: str, name: str | None, device: str) -> Op:
    """The function for `op` on a device type: the named backend, or the first that can run."""
    candidates = backends(op)
    names = ", ".join(backend.name for backend in candidates)
    if name is not None:
        candidates = tuple(backend for backend in candidates if backend.name == name)
        if not candidates:
            raise BackendError(f"{op} has no backend {name!r}; choose from {names}")
    reasons = {backend.name: backend.missing(device) for backend in candidates}
    for backend in candidates:
        if reasons[backend.name] is None:
            return backend.load(op)
    raise BackendError(f"{op}: " + "; ".join(f"{backend} {reason}" for backend, reason in reasons.items()))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Recurrent states are fp32, or fp64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)
