"""Softmax attention over a window."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..layout import by_token, documents
from ..library import TYPES, address, library
from ..slots import Slots, to_update
from .calls import Tokens, for_tokens, kernel, starts_of, tokens_of


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, Tokens) for name in ("q", "k", "v")),
        *((name, c_void_p) for name in ("tokens", "starts", "first", "slots", "pool")),
        *((name, c_int64) for name in ("pool_type", "capacity")),
        ("out", c_void_p),
        ("scale", c_float),
        ("sinks", c_void_p),
        *((name, c_int64) for name in ("num_sinks", "heads", "groups", "width", "window")),
    ]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    positions: Tensor,
    scale: float,
    sinks: Tensor | None,
    state: Tensor | Slots | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots | None]:
    """Blocks of keys in the order of their positions, the same bits however the tokens are cut into chunks."""
    tokens, starts = starts_of(q, cu_seqlens, mask)
    if cu_seqlens is None and mask is None:
        first = positions[:, :1].reshape(-1) if q.shape[1] else starts[:-1] * 0
    else:
        first = documents(q.shape[0], q.shape[1], cu_seqlens, mask, q.device).first(positions)
    q, k, v = (by_token(x) for x in (q, k, v))
    pool, slots = None, None
    if state is not None:
        state, pool, slots = to_update(state)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    return _window_attention(q, k, v, sinks, pool, slots, tokens, starts, first.contiguous(), window, scale), state


def _empty(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], others[1].shape[3])  # as wide as v


@kernel("window_attention_", _empty, mutates=("pool",))
def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    pool: Tensor | None,
    slots: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
    first: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    out = for_tokens(q, v.shape[3], tokens, q.dtype)
    pool_type, capacity = (0, 0) if pool is None else (TYPES[pool.dtype], pool.shape[1])
    call = _Attention(
        *(tokens_of(x) for x in (q, k, v)),
        *(address(x) for x in (tokens, starts, first, slots, pool)),
        *(pool_type, capacity, out.data_ptr(), scale),
        *(address(sinks), 0 if sinks is None else len(sinks), q.shape[2], k.shape[2], k.shape[3], window),
    )
    library().window_attention(ctypes.addressof(call), len(starts) - 1, torch.get_num_threads())
    return out
