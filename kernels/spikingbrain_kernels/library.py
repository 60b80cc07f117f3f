"""The compiled library: found and loaded when first used, one set of functions for each instruction set.

Built from `csrc/` by the package's own build; every kernel is in it once a level (baseline, AVX2, AVX-512), and the
best level this processor has is used unless another is asked for by name.
"""

import contextlib
import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_double, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backends import BackendError

# What the functions below take and mean: raised, here and in `csrc/levels.cpp`, with every change of it.
VERSION = 6
FILE = Path(__file__).with_name("libnative.so")
LEVELS = ("avx512", "avx2", "baseline")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int16: 2}

Kernel = Callable[..., None]

# In the order of the C functions' parameters.
SIGNATURES = {
    "linear": [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, *[c_int64] * 3, c_double, c_int64],
    "gated_linear": [c_void_p, c_int64, c_int64],
    "gated_linear_backward": [c_void_p, c_void_p, c_int64, c_int64],
    "window_attention": [c_void_p, c_int64, c_int64],
    "window_attention_backward": [c_void_p, c_void_p, c_int64, c_int64],
    "wkv": [*[c_void_p] * 4, c_int64, c_int64],
    "lif_scan": [c_void_p, *[c_float] * 3, *[c_int64] * 4],
    "short_conv": [c_void_p, c_void_p, *[c_int64] * 3],
    "add": [c_void_p, c_void_p, c_int64, c_int64, c_void_p],
    "relu": [c_void_p, c_int64, c_int64, c_void_p],
    "rms_norm": [c_void_p, c_int64, c_void_p, c_float, c_int64, c_int64, c_void_p, c_int64],
    "encode_adaptive": [c_void_p, c_int64, *[c_float] * 3, c_int64, c_int64, c_void_p, c_void_p, c_int64],
    "encode_dead_zone": [
        *(c_void_p, c_int64, c_void_p, c_void_p, c_int64),
        *(*[c_float] * 3, c_int64, c_int64, c_void_p, c_void_p, c_int64),
    ],
    "log_sigmoid": [c_void_p, c_int64, c_float, *[c_int64] * 3, c_void_p, c_int64],
    "rotary": [c_void_p, c_int64, c_void_p, c_void_p, c_float, *[c_int64] * 4, c_void_p, c_int64],
    "swiglu": [c_void_p, c_void_p, *[c_int64] * 4, c_void_p, c_int64],
    "swiglu_backward": [c_void_p, c_void_p, *[c_int64] * 4, *[c_void_p] * 3, c_int64],
}


def missing() -> str | None:
    """Why the library cannot be used, or None if it can."""
    if not FILE.exists():
        return "was not built: install a C++17 compiler (g++ or clang++), then install this package again"
    found = _version(FILE)
    if found == VERSION:
        return None
    return f"was built from other sources (version {found}, not {VERSION}): install this package again"


@cache
def _version(file: Path) -> int:
    """The version of a library; 1 for those that do not say."""
    # torch is loaded by now, so both use the one OpenMP runtime that torch brought.
    function = getattr(ctypes.CDLL(str(file)), "sb_version", None)
    return function() if function else 1


@cache
def _load() -> ctypes.CDLL:
    reason = missing()
    if reason:
        raise BackendError(f"native {reason}")
    return ctypes.CDLL(str(FILE))


class Library:
    """The functions of one level; their parameters are those of the C sources."""

    linear: Kernel
    gated_linear: Kernel
    gated_linear_backward: Kernel
    window_attention: Kernel
    window_attention_backward: Kernel
    wkv: Kernel
    lif_scan: Kernel
    short_conv: Kernel
    add: Kernel
    relu: Kernel
    rms_norm: Kernel
    encode_adaptive: Kernel
    encode_dead_zone: Kernel
    swiglu: Kernel
    swiglu_backward: Kernel
    log_sigmoid: Kernel
    rotary: Kernel

    def __init__(self, level: str):
        library = _load()
        self.level = level
        for name, parameters in SIGNATURES.items():
            function = getattr(library, f"sb_{level}_{name}")
            function.argtypes, function.restype = parameters, None
            setattr(self, name, function)


def levels() -> tuple[str, ...]:
    """The levels this processor can run, best first."""
    return tuple(level for level in LEVELS if _has(level))


def _has(level: str) -> bool:
    return hasattr(_load(), f"sb_{level}_linear") and bool(getattr(_load(), f"sb_has_{level}")())


@cache
def library(level: str | None = None) -> Library:
    """The functions of `level`, or of the best level; raises `BackendError` for one that cannot run here."""
    choices = levels()
    if level is not None and level not in choices:
        raise BackendError(f"this processor has no level {level!r}; choose from {', '.join(choices)}")
    return Library(level or choices[0])


def function(name: str) -> Any:
    """A function of the best level as ctypes has it, whether or not calls are being recorded."""
    return getattr(_load(), f"sb_{library().level}_{name}")


# Of each tensor whose address a function got, while calls are recorded.
_KEPT: list[list[Tensor]] = []


def address(x: Tensor | None) -> int | None:
    """Where a tensor's data begins, for a function of the library."""
    if x is None:
        return None
    for kept in _KEPT:
        kept.append(x)
    return x.data_ptr()


@contextlib.contextmanager
def recorded(note: Callable[[Kernel, tuple[Any, ...]], None], kept: list[Tensor]) -> Iterator[None]:
    """Call `note(function, args)` with each call of the best level's functions that this thread makes in the block.

    `kept` gets all tensors whose addresses were taken, so that the same calls can be made again. One block at a time.
    """
    owner, functions = threading.get_ident(), library() if missing() is None else None

    def listening(function: Kernel) -> Kernel:
        def call(*args: Any) -> None:
            function(*args)
            if threading.get_ident() == owner:
                note(function, args)

        return call

    plain = dict(vars(functions)) if functions else {}
    _KEPT.append(kept)
    try:
        for name in SIGNATURES if functions else ():
            setattr(functions, name, listening(plain[name]))
        yield
    finally:
        _KEPT.clear()
        if functions:
            vars(functions).update(plain)


class _Replayed(ctypes.Structure):
    """`Replayed` in the C sources: a function that takes its arguments as words, and the words."""

    _fields_ = [("function", c_void_p), ("words", c_void_p)]


def again(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> Callable[[], None]:
    """What makes `calls` of the library's functions once more, one after another, with no Python between them.

    The addresses among the arguments have to stay what they are.
    """
    replay = _load().sb_replay
    replay.argtypes, replay.restype = [c_void_p, c_int64], None
    words = [(c_int64 * len(args))(*map(_word, called.argtypes, args)) for called, args in calls]
    functions = [ctypes.cast(getattr(_load(), f"{called.__name__}_replayed"), c_void_p) for called, _ in calls]
    entries = [_Replayed(one, ctypes.addressof(own)) for one, own in zip(functions, words, strict=True)]
    kept = (_Replayed * len(calls))(*entries), words, calls
    return lambda: replay(kept[0], len(kept[1]))


def _word(kind: Any, argument: Any) -> int:
    """An argument of a C function as 64 bits; what `ctypes.byref` gave is the address of what it refers to."""
    if kind in (c_float, c_double):
        return int.from_bytes(struct.pack("d", argument), sys.byteorder, signed=True)
    if argument is None:
        return 0
    return int(argument) if isinstance(argument, int) else ctypes.addressof(argument._obj)
