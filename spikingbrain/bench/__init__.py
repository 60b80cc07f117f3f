"""Benchmarks: one file a suite, found through the entry-point group `spikingbrain.benchmarks`.

A suite is a module with a docstring (its help), `add_arguments(parser)` and `run(args) -> list[Row]`. It raises
`ResultsDiffer` instead of giving figures of something that computes the wrong thing. `machine()`, where it has one,
names what it ran on.
"""

import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikingbrain_kernels.library import library, missing

from ..errors import InputError

Row = dict[str, Any]


class ResultsDiffer(InputError):
    """What was to be timed does not compute what it should."""


def seconds(call: Callable[[int], object], *, repeats: int, warm_up: int = 1) -> float:
    """The time of `call(i)` that a tenth of the calls stay below."""
    return seconds_in_turn([call], repeats=repeats, warm_up=warm_up)[0]


def seconds_in_turn(calls: Sequence[Callable[[int], object]], *, repeats: int, warm_up: int = 1) -> list[float]:
    """The same of several that take turns, so that a machine that slows down slows all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(-warm_up, repeats):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call(i % repeats)
            own.append(time.perf_counter() - start)
    return [sorted(own[warm_up:])[repeats // 10] for own in times]


READ = 1 << 30


def reading() -> Callable[[int], object]:
    """A call that reads `READ` bytes from memory with all threads."""
    memory = torch.ones(READ // 4)
    return lambda _: memory.sum()


def read_bandwidth() -> float:
    """Bytes a second that this machine's threads read from memory, at best."""
    return READ / seconds(reading(), repeats=5)


def require_close(what: str, value: Tensor, expected: Tensor, tolerance: float) -> float:
    """The relative RMS error; raises `ResultsDiffer` where it is not below `tolerance`."""
    difference = (value.double() - expected.double()).pow(2).mean().sqrt()
    error = float(difference / expected.double().pow(2).mean().sqrt())
    if not error < tolerance:
        raise ResultsDiffer(f"{what} differs from its reference by {error:.1e} (allowed {tolerance:.0e}): not timed")
    return error


def machine() -> str:
    """The processor, the level its native kernels run at and the number of threads, as a file name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    level = "" if missing() else library().level
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {level} {torch.get_num_threads()} threads".lower()).strip("-")
