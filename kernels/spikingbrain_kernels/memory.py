"""Memory for what is read at every token. On huge pages reading it costs fewer walks through page tables."""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.zeros`; of at least a huge page on a CPU whose system has them for those that ask (Linux), on huge pages.

    What is left over at its end is on ordinary ones.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        return torch.zeros(tuple(shape), dtype=dtype)  # torch says in its own words that there is no such memory
    # It is advice: a kernel built without huge pages refuses it, and nothing else changes.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    start = -room.data_ptr() % HUGE
    return room[start : start + size].view(dtype).view(tuple(shape))
