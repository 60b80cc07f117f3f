"""Gated linear attention, with gradients, and the gated delta rule."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import needs_gradients
from ..layout import by_token
from ..library import address, library
from ..slots import Slots, to_update
from .calls import Tokens, as_wide_as_v, for_tokens, kernel, starts_of, tokens_of

# Tokens from one state kept for the backward pass to the next; as in the C sources.
CHUNK = 16


class _Recurrence(ctypes.Structure):
    _fields_ = [
        *((name, Tokens) for name in ("q", "k", "v", "decay")),
        *((name, c_void_p) for name in ("tokens", "starts", "slots", "pool", "out")),
        ("scale", c_float),
        *((name, c_int64) for name in ("heads", "groups", "key", "value", "decay_width")),
        ("kept", c_void_p),
        ("beta", Tokens),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("out", "state", "q", "k", "v", "decay", "first")]


def gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | Slots,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots]:
    """The recurrence of `reference.gated_linear`."""
    tokens, starts = starts_of(q, cu_seqlens, mask)
    q, k, v, log_decay = (by_token(x) for x in (q, k, v, log_decay))
    if isinstance(state, Tensor) and needs_gradients(q, k, v, log_decay, state):
        return _gated_linear_kept(q, k, v, log_decay, state, tokens, starts, scale)[:2]
    state, pool, slots = to_update(state)
    return _recur(q, k, v, log_decay, None, pool, slots, tokens, starts, scale), state


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | Slots,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots]:
    """The recurrence of `reference.gated_delta`."""
    tokens, starts = starts_of(q, cu_seqlens, mask)
    q, k, v, beta, log_decay = (by_token(x) for x in (q, k, v, beta, log_decay))
    state, pool, slots = to_update(state)
    return _recur(q, k, v, log_decay, beta, pool, slots, tokens, starts, scale), state


@kernel("recur_", as_wide_as_v, mutates=("pool",))
def _recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    pool: Tensor,
    slots: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
    scale: float,
) -> Tensor:
    out = for_tokens(q, v.shape[3], tokens, q.dtype)
    call = _recurrence(q, k, v, log_decay, tokens, starts, scale, slots=slots, pool=pool, out=out)
    if beta is not None:
        call.beta = tokens_of(beta)
    library().gated_linear(ctypes.byref(call), len(starts) - 1, torch.get_num_threads())
    return out


def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    tokens: Tensor | None,
    starts: Tensor,
    scale: float,
    *,
    slots: Tensor | None = None,
    pool: Tensor | None = None,
    out: Tensor | None = None,
    kept: Tensor | None = None,
) -> _Recurrence:
    return _Recurrence(
        *(tokens_of(x) for x in (q, k, v, log_decay)),
        *(address(x) for x in (tokens, starts, slots, pool, out)),
        scale,
        *(q.shape[2], k.shape[2], k.shape[3], v.shape[3], log_decay.shape[3]),
        address(kept),
    )


@custom_op("spikingbrain::gated_linear_kept", mutates_args=())
def _gated_linear_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    tokens: Tensor | None,
    starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the new states, and the states before every chunk, from which the backward pass starts."""
    out, state, kept = _results_kept(q, v, state, tokens, starts)
    call = _recurrence(q, k, v, log_decay, tokens, starts, scale, pool=state, out=out, kept=kept)
    library().gated_linear(ctypes.byref(call), len(starts) - 1, torch.get_num_threads())
    return out, state, kept


def _results_kept(
    q: Tensor, v: Tensor, state: Tensor, tokens: Tensor | None, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = q.shape[0] * q.shape[1] // CHUNK + len(starts) - 1
    kept = state.new_empty(chunks, *state.shape[1:])
    return for_tokens(q, v.shape[3], tokens, q.dtype), state.clone(memory_format=torch.contiguous_format), kept


@custom_op("spikingbrain::gated_linear_backward", mutates_args=())
def _gated_linear_backward(
    out: Tensor,
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    kept: Tensor,
    tokens: Tensor | None,
    starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients, in fp32, of q, k, v, the decay and the first states from those of the outputs and the last states."""
    inputs = (q, k, v, log_decay)
    found = tuple(for_tokens(x, x.shape[3], tokens, torch.float32) for x in inputs)
    out, state = out.float().contiguous(), state.contiguous()
    first = torch.empty_like(state)
    gradients = _Gradients(*(address(x) for x in (out, state, *found, first)))
    call = _recurrence(*inputs, tokens, starts, scale, kept=kept)
    threads = torch.get_num_threads()
    library().gated_linear_backward(ctypes.byref(call), ctypes.byref(gradients), len(starts) - 1, threads)
    query, key, value, decay = found
    return query, key, value, decay, first


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, _, tokens, starts, scale = inputs
    ctx.save_for_backward(q, k, v, log_decay, output[2], tokens, starts)
    ctx.scale = scale


def _backward_of_kept(ctx: Any, out: Tensor, state: Tensor, _kept: Tensor) -> tuple[Tensor | None, ...]:
    # Once only: activation checkpointing lets what was saved be taken out a single time.
    saved = ctx.saved_tensors
    *found, first = _gated_linear_backward(out, state, *saved, ctx.scale)
    return *(x.to(like.dtype) for x, like in zip(found, saved, strict=False)), first, None, None, None


_gated_linear_kept.register_autograd(_backward_of_kept, setup_context=_keep_for_backward)


@_gated_linear_kept.register_fake
def _(q, k, v, log_decay, state, tokens, starts, scale):  # noqa: ARG001
    return _results_kept(q, v, state, tokens, starts)


@_gated_linear_backward.register_fake
def _(out, state, q, k, v, log_decay, kept, tokens, starts, scale):  # noqa: ARG001
    return *(x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v, log_decay)), torch.empty_like(state)
