"""Recurrences that treat each channel alone."""

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..library import TYPES, address, library
from ..slots import Slots, to_update
from .calls import Tokens, for_tokens, kernel, starts_of, tokens_of


class _Channels(ctypes.Structure):
    _fields_ = [
        ("x", Tokens),
        *((name, c_void_p) for name in ("tokens", "starts", "slots", "pool")),
        ("pool_type", c_int64),
        ("out", c_void_p),
        ("channels", c_int64),
    ]


def wkv(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    *,
    state: Tensor | Slots,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots]:
    """The recurrence of `reference.wkv`."""
    tokens, starts = starts_of(k, cu_seqlens, mask)
    state, pool, slots = to_update(state)
    decay, first = -time_decay.float().exp(), time_first.float().contiguous()
    return _wkv(_by_token(k), _by_token(v), decay, first, pool, slots, tokens, starts), state


def lif_scan(
    x: Tensor,
    *,
    tau: float,
    v_th: float,
    v_reset: float | None,
    decay_input: bool,
    state: Tensor | Slots,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots]:
    """The recurrence of `reference.lif_scan`, in every bit."""
    tokens, starts = starts_of(x, cu_seqlens, mask)
    state, pool, slots = to_update(state)
    return _lif_scan(_by_token(x), pool, slots, tokens, starts, tau, v_th, v_reset, decay_input), state


def short_conv(
    x: Tensor, weight: Tensor, *, state: Tensor | Slots, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | Slots]:
    """The recurrence of `reference.short_conv`."""
    tokens, starts = starts_of(x, cu_seqlens, mask)
    state, pool, slots = to_update(state)
    return _short_conv(_by_token(x), weight.float().contiguous(), pool, slots, tokens, starts), state


def _by_token(x: Tensor) -> Tensor:
    """x `[B, T, C]` with its channels contiguous and its tokens at equal distances."""
    by_row = x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.stride(1) * x.shape[1]
    return x if by_row and x.stride(2) == 1 else x.contiguous()


def _channels(x: Tensor, out: Tensor, pool: Tensor, *documents: Tensor | None) -> _Channels:
    data = (*(address(part) for part in documents), address(pool), TYPES[pool.dtype])
    return _Channels(tokens_of(x), *data, address(out), x.shape[2])


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@kernel("wkv_", _like_first, mutates=("pool",))
def _wkv(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    first: Tensor,
    pool: Tensor,
    slots: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
) -> Tensor:
    out, values = for_tokens(k, k.shape[2], tokens, k.dtype), tokens_of(v)
    call = _channels(k, out, pool, tokens, starts, slots)
    addresses = (ctypes.byref(call), ctypes.byref(values), address(decay), address(first))
    library().wkv(*addresses, len(starts) - 1, torch.get_num_threads())
    return out


@kernel("lif_scan_", _like_first, mutates=("pool",))
def _lif_scan(
    x: Tensor,
    pool: Tensor,
    slots: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
    tau: float,
    v_th: float,
    v_reset: float | None,
    decay_input: bool,
) -> Tensor:
    out = for_tokens(x, x.shape[2], tokens, x.dtype)
    call = _channels(x, out, pool, tokens, starts, slots)
    neuron = (tau, v_th, v_reset or 0.0, v_reset is None, decay_input)
    library().lif_scan(ctypes.byref(call), *neuron, len(starts) - 1, torch.get_num_threads())
    return out


@kernel("short_conv_", _like_first, mutates=("pool",))
def _short_conv(
    x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor | None, tokens: Tensor | None, starts: Tensor
) -> Tensor:
    out = for_tokens(x, x.shape[2], tokens, x.dtype)
    call = _channels(x, out, pool, tokens, starts, slots)
    size = (address(weight), weight.shape[1], len(starts) - 1)
    library().short_conv(ctypes.byref(call), *size, torch.get_num_threads())
    return out
