"""Softmax attention over a window, with gradients."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import after, needs_gradients
from ..layout import by_token, documents
from ..library import TYPES, address, library
from ..slots import Slots, to_update
from .calls import Tokens, as_wide_as_v, for_tokens, kernel, starts_of, tokens_of


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, Tokens) for name in ("q", "k", "v")),
        *((name, c_void_p) for name in ("tokens", "starts", "first", "slots", "pool")),
        *((name, c_int64) for name in ("pool_type", "capacity")),
        ("out", c_void_p),
        ("scale", c_float),
        ("sinks", c_void_p),
        *((name, c_int64) for name in ("num_sinks", "heads", "groups", "width", "window")),
        ("kept", c_void_p),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("out", "delta", "q", "k", "v", "sinks")]


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
    learns = needs_gradients(q, k, v, sinks, state)
    if learns and state is not None:
        # Gradients of what a ring holds pass through torch's blocks.
        options = {"sinks": sinks, "state": state, "cu_seqlens": cu_seqlens, "mask": mask}
        run = after("native", "window_attention", q)
        return run(q, k, v, window=window, positions=positions, scale=scale, **options)
    tokens, starts = starts_of(q, cu_seqlens, mask)
    if cu_seqlens is None and mask is None:
        first = positions[:, :1].reshape(-1) if q.shape[1] else starts[:-1] * 0
    else:
        first = documents(q.shape[0], q.shape[1], cu_seqlens, mask, q.device).first(positions)
    q, k, v = (by_token(x) for x in (q, k, v))
    sinks = None if sinks is None else sinks.float().contiguous()
    if learns:
        # Nothing lies farther back than the row is long; a window without an end would be too long to count with.
        window = min(window, q.shape[1])
        return _window_attention_kept(q, k, v, sinks, tokens, starts, first.contiguous(), window, scale)[0], None
    pool, slots = None, None
    if state is not None:
        state, pool, slots = to_update(state)
    return _window_attention(q, k, v, sinks, pool, slots, tokens, starts, first.contiguous(), window, scale), state


@kernel("window_attention_", as_wide_as_v, mutates=("pool",))
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
    call = _attention(q, k, v, sinks, tokens, starts, first, window, scale, pool=pool, slots=slots, out=out)
    library().window_attention(ctypes.byref(call), len(starts) - 1, torch.get_num_threads())
    return out


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
    first: Tensor,
    window: int,
    scale: float,
    *,
    pool: Tensor | None = None,
    slots: Tensor | None = None,
    out: Tensor | None = None,
    kept: Tensor | None = None,
) -> _Attention:
    pool_type, capacity = (0, 0) if pool is None else (TYPES[pool.dtype], pool.shape[1])
    return _Attention(
        *(tokens_of(x) for x in (q, k, v)),
        *(address(x) for x in (tokens, starts, first, slots, pool)),
        *(pool_type, capacity, address(out), scale),
        *(address(sinks), 0 if sinks is None else len(sinks), q.shape[2], k.shape[2], k.shape[3], window),
        address(kept),
    )


@custom_op("spikingbrain::window_attention_kept", mutates_args=())
def _window_attention_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
    first: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the logarithms of the sums of e^score `[B, T, H, 1]`, from which the backward pass starts."""
    out, kept = for_tokens(q, v.shape[3], tokens, q.dtype), for_tokens(q, 1, tokens, torch.float32)
    call = _attention(q, k, v, sinks, tokens, starts, first, window, scale, out=out, kept=kept)
    library().window_attention(ctypes.byref(call), len(starts) - 1, torch.get_num_threads())
    return out, kept


@custom_op("spikingbrain::window_attention_backward", mutates_args=())
def _window_attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
    first: Tensor,
    out: Tensor,
    kept: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, in fp32, of q, k, v and, document by document, the sinks from that of the outputs."""
    gradient = gradient.float().contiguous()
    delta = (gradient * out).sum(-1)
    query = q.new_zeros(q.shape, dtype=torch.float32)
    key, value = (for_tokens(x, x.shape[3], tokens, torch.float32) for x in (k, v))
    sink = _for_sinks(k, sinks, starts)
    gradients = _Gradients(*(address(x) for x in (gradient, delta, query, key, value, sink)))
    call = _attention(q, k, v, sinks, tokens, starts, first, window, scale, kept=kept)
    threads = torch.get_num_threads()
    library().window_attention_backward(ctypes.byref(call), ctypes.byref(gradients), len(starts) - 1, threads)
    return query, key, value, sink


def _for_sinks(k: Tensor, sinks: Tensor | None, starts: Tensor) -> Tensor:
    """`[D, S, 2, H_kv, K]` to be written; S = 0 without sinks."""
    count = 0 if sinks is None else len(sinks)
    return k.new_empty(len(starts) - 1, count, 2, *k.shape[2:], dtype=torch.float32)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = window, scale


def _backward_of_kept(ctx: Any, gradient: Tensor, _kept: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    q, k, v, sinks, *_ = saved
    *found, sink = _window_attention_backward(gradient, *saved, *ctx.options)
    found = [x.to(like.dtype) for x, like in zip(found, (q, k, v), strict=True)]
    return *found, None if sinks is None else sink.sum(0), None, None, None, None, None


_window_attention_kept.register_autograd(_backward_of_kept, setup_context=_keep_for_backward)


@_window_attention_kept.register_fake
def _(q, k, v, sinks, tokens, starts, first, window, scale):  # noqa: ARG001
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)


@_window_attention_backward.register_fake
def _(gradient, q, k, v, sinks, tokens, starts, first, out, kept, window, scale):  # noqa: ARG001
    return *(x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v)), _for_sinks(k, sinks, starts)
