"""The one table of backends: which function serves which op on which device, and what to install for those missing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Any]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BackendError(ValueError):
    """An unknown op or backend, or one that cannot run here; the message names the choices."""


@dataclass(frozen=True)
class Backend:
    """A module of this package with one function per op, the device types it runs on and the packages it needs.

    `in_place`: it takes `Slots` for a state and updates them where they lie. `library`: the module of this package that
    says whether a compiled library is there. `forward_only`: the ops that have no gradients here.
    """

    name: str
    devices: tuple[str, ...]
    ops: tuple[str, ...]
    requires: tuple[str, ...] = ()
    extra: str = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    forward_only: tuple[str, ...] = ()
    in_place: bool = False
    library: str = ""

    def missing(self, device: str, dtype: torch.dtype | None = None, gradients_of: str | None = None) -> str | None:
        """Why it cannot run on `device` with inputs of `dtype`, with gradients of that op; None if it can."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        if dtype is not None and dtype not in self.dtypes:
            return f"computes in {' and '.join(str(known) for known in self.dtypes)}, not in {dtype}"
        if gradients_of in self.forward_only:
            return "has no gradients: use torch.no_grad(), or another backend to train"
        if self.library and (reason := import_module(f"spikingbrain_kernels.{self.library}").missing()):
            return reason
        absent = [package for package in self.requires if find_spec(package) is None]
        if absent:
            return f"needs {', '.join(absent)}: pip install 'spikingbrain[{self.extra}]'"
        return None

    def load(self, op: str) -> Op:
        """The function that serves `op`."""
        return getattr(import_module(f"spikingbrain_kernels.{self.name}"), op)


RECURRENT_OPS = ("gated_linear", "gated_delta", "wkv", "lif_scan", "short_conv", "window_attention")
OTHER_OPS = (
    *("linear", "spike_linear", "rms_norm", "encode_adaptive", "encode_dead_zone", "rms_norm_encode"),
    *("swiglu", "log_sigmoid", "rotary"),
)
OPS = (*RECURRENT_OPS, *OTHER_OPS)
FLA_OPS = ("gated_linear", "gated_delta")
ANY_DEVICE = ("cpu", "cuda", "meta")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_LEARNS = ("gated_linear", "window_attention", "swiglu", "rotary")
TRITON_LEARNS = ("gated_linear",)

# In order of preference.
BACKENDS = (
    Backend(
        "native",
        ("cpu",),
        OPS,
        dtypes=NATIVE_DTYPES,
        forward_only=tuple(op for op in OPS if op not in NATIVE_LEARNS),
        in_place=True,
        library="library",
    ),
    Backend(
        "triton",
        ("cuda",),
        OPS,
        ("triton",),
        "cuda",
        TRITON_DTYPES,
        forward_only=tuple(op for op in OPS if op not in TRITON_LEARNS),
        in_place=True,
    ),
    Backend("fla", ("cuda",), FLA_OPS, ("triton", "fla"), "cuda", TRITON_DTYPES),
    Backend("chunked", ANY_DEVICE, RECURRENT_OPS),
    Backend("reference", ANY_DEVICE, OPS),
)


def backends(op: str) -> tuple[Backend, ...]:
    """Every backend that has `op`, best first; raises `BackendError` for an unknown op."""
    if op not in OPS:
        raise BackendError(f"unknown op {op!r}; choose from {', '.join(OPS)}")
    return tuple(backend for backend in BACKENDS if op in backend.ops)


def after(name: str, op: str, *inputs: Tensor) -> Op:
    """What serves `op` on these inputs were backend `name` and those before it not there."""
    candidates, wanted = backends(op), _wanted(op, None, inputs)
    rest = candidates[[backend.name for backend in candidates].index(name) + 1 :]
    device, dtype, learns = wanted[2:]
    return next(backend for backend in rest if backend.missing(device, dtype, op if learns else None) is None).load(op)


@cache
def choose(op: str, name: str | None, device: str, dtype: torch.dtype | None, learns: bool) -> Backend:
    """The named backend of `op`, or the first that can run on such inputs; raises `BackendError` saying why not."""
    candidates = backends(op)
    names = ", ".join(backend.name for backend in candidates)
    if name is not None:
        candidates = tuple(backend for backend in candidates if backend.name == name)
        if not candidates:
            raise BackendError(f"{op} has no backend {name!r}; choose from {names}")
    reasons = {backend.name: backend.missing(device, dtype, op if learns else None) for backend in candidates}
    for backend in candidates:
        if reasons[backend.name] is None:
            return backend
    raise BackendError(f"{op}: " + "; ".join(f"{backend} {reason}" for backend, reason in reasons.items()))


# What was chosen so far, by what `_wanted` gives: the function and whether it works in place on a pool.
_CHOSEN: dict[tuple[Any, ...], tuple[Op, bool]] = {}
# The functions loaded so far, by op and backend: a cache that torch.compile can read.
_FUNCTIONS: dict[str, dict[str, Op]] = {op: {} for op in OPS}


def _choose(wanted: tuple[Any, ...]) -> tuple[Op, bool]:
    if wanted not in _CHOSEN:
        backend, op, learns = choose(*wanted), wanted[0], wanted[-1]
        _FUNCTIONS[op][backend.name] = backend.load(op)
        _CHOSEN[wanted] = _FUNCTIONS[op][backend.name], backend.in_place and not learns
    return _CHOSEN[wanted]


# torch.compile does not look into a function whose result it may take as constant.
@torch.compiler.assume_constant_result
def _name(*wanted: Any) -> str:
    _choose(wanted)
    return choose(*wanted).name


@torch.compiler.assume_constant_result
def _in_place(*wanted: Any) -> bool:
    return _choose(wanted)[1]


def needs_gradients(*inputs: Any) -> bool:
    """Whether a backward pass will come to any tensor of `inputs`."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _wanted(op: str, name: str | None, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    first = inputs[0]
    return op, name, "cpu" if first.is_cpu else first.device.type, first.dtype, needs_gradients(*inputs)


def resolve(op: str, name: str | None, *inputs: Tensor) -> Op:
    """The function for `op` on these inputs: the named backend's, or that of the first that can run."""
    wanted = _wanted(op, name, inputs)
    if torch.compiler.is_dynamo_compiling():
        return _FUNCTIONS[op][_name(*wanted)]
    return (_CHOSEN.get(wanted) or _choose(wanted))[0]


def works_in_place(op: str, name: str | None, *inputs: Tensor) -> bool:
    """Whether the backend that `resolve` chooses updates states where they lie in a pool."""
    return _in_place(*_wanted(op, name, inputs))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Recurrent states are fp32, or fp64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)
