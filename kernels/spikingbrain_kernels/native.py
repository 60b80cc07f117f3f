"""The C++ kernels as ops: forward passes in fp32 and bf16 on the CPU, states updated in place where they lie in a pool.

Under torch.compile each call is a custom op with a fake implementation; in eager mode the C function is called
directly, because the dispatcher costs more than a decode step of one layer.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .backends import after
from .layout import by_token, documents, token_stride
from .library import TYPES, address, library
from .packed import KINDS, PANEL, CPacked, Packed
from .slots import Slots, to_update

# Tokens from one state kept for the backward pass to the next; as in the C sources.
CHUNK = 16
# A row goes alone while the weights its spikes touch, summed over the rows, are fewer than this many whole matrices.
BREAK_EVEN_ROWS = 1.5


class _Tokens(ctypes.Structure):
    """`Tensor` in the C sources: data, type, elements from token to token."""

    _fields_ = [("data", c_void_p), ("type", c_int64), ("stride", c_int64)]


class _Recurrence(ctypes.Structure):
    _fields_ = [
        *((name, _Tokens) for name in ("q", "k", "v", "decay")),
        *((name, c_void_p) for name in ("tokens", "starts", "slots", "pool", "out")),
        ("scale", c_float),
        *((name, c_int64) for name in ("heads", "groups", "key", "value", "decay_width")),
        ("kept", c_void_p),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("out", "state", "q", "k", "v", "decay", "first")]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Tokens) for name in ("q", "k", "v")),
        *((name, c_void_p) for name in ("tokens", "starts", "first", "slots", "pool")),
        *((name, c_int64) for name in ("pool_type", "capacity")),
        ("out", c_void_p),
        ("scale", c_float),
        ("sinks", c_void_p),
        *((name, c_int64) for name in ("num_sinks", "heads", "groups", "width", "window")),
        ("kept", c_void_p),
    ]


class _AttentionGradients(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("out", "delta", "q", "k", "v", "sinks")]


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
    """The recurrence of `reference.gated_linear`, the same bits however the tokens are cut into chunks."""
    tokens, starts = _layout(q, cu_seqlens, mask)
    q, k, v, log_decay = (by_token(x) for x in (q, k, v, log_decay))
    if isinstance(state, Tensor) and _needs_gradients(q, k, v, log_decay, state):
        return _OPS["gated_linear_kept"](q, k, v, log_decay, state, tokens, starts, scale)[:2]
    state, pool, slots = to_update(state)
    return _call("gated_linear_", _gated_linear, q, k, v, log_decay, pool, slots, tokens, starts, scale), state


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
    learning = _needs_gradients(*(x for x in (q, k, v, sinks, state) if isinstance(x, Tensor)))
    if learning and state is not None:
        # Gradients of a ring pass through torch's blocks.
        options = {"sinks": sinks, "state": state, "cu_seqlens": cu_seqlens, "mask": mask}
        run = after("native", "window_attention", q)
        return run(q, k, v, window=window, positions=positions, scale=scale, **options)
    tokens, starts = _layout(q, cu_seqlens, mask)
    if cu_seqlens is None and mask is None:
        first = positions[:, :1].reshape(-1) if q.shape[1] else starts[:-1] * 0
    else:
        first = documents(q.shape[0], q.shape[1], cu_seqlens, mask, q.device).first(positions)
    q, k, v = (by_token(x) for x in (q, k, v))
    sinks = None if sinks is None else sinks.float().contiguous()
    if learning:
        return _OPS["window_attention_kept"](q, k, v, sinks, tokens, starts, first.contiguous(), window, scale)[0], None
    pool, slots = None, None
    if state is not None:
        state, pool, slots = to_update(state)
    args = (q, k, v, sinks, pool, slots, tokens, starts, first.contiguous(), window, scale)
    return _call("window_attention_", _window_attention, *args), state


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x W^T + b, in x's type."""
    return _apply(x, packed, None, bias, False)


def spike_linear(counts: Tensor, scale: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """scale * (counts W^T) + b, in the type of `counts` (fp32 where they are integers)."""
    return _apply(counts, packed, scale, bias, True)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension; `weight` in fp32."""
    return _call("rms_norm", _rms_norm, x.contiguous(), weight, epsilon)


def encode_adaptive(x: Tensor, k: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Counts `round(x / scale)` in x's type and scale `clamp(mean|x| / k, low, high) [..., 1]`."""
    return _call("encode_adaptive", _encode_adaptive, x.contiguous(), k, low, high)


def rms_norm_encode(
    x: Tensor, weight: Tensor, epsilon: float, k: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The norm, then the counts and their scale."""
    return encode_adaptive(rms_norm(x, weight, epsilon), k, low, high)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; each `[..., N]`."""
    first, second = _rows(gate), _rows(up)
    if first.stride(0) != second.stride(0):
        first, second = first.contiguous(), second.contiguous()
    return _call("swiglu", _swiglu, first, second).view(gate.shape)


def log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    """log(sigmoid(x)) / divisor in fp32; x `[..., N]`."""
    return _call("log_sigmoid", _log_sigmoid, _rows(x), divisor).view(x.shape)


def rotary(x: Tensor, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Turn the pairs of x's heads by position * frequency."""
    return _call("rotary", _rotary, by_token(x), positions.contiguous(), frequencies, factor)


def _needs_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _call(name: str, eager: Callable[..., Any], *args: Any) -> Any:
    return _OPS[name](*args) if torch.compiler.is_compiling() else eager(*args)


@lru_cache(maxsize=64)
def _even_starts(rows: int, length: int) -> Tensor:
    # Kept for later calls, which may save it for a backward pass: it must not be made as an inference tensor.
    with torch.inference_mode(False):
        return torch.arange(rows + 1) * length


def _layout(q: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The documents' tokens (None: all, in order) and where each begins among them."""
    if cu_seqlens is None and mask is None:
        rows, length = q.shape[:2]
        return None, torch.arange(rows + 1) * length if torch.compiler.is_compiling() else _even_starts(rows, length)
    docs = documents(q.shape[0], q.shape[1], cu_seqlens, mask, q.device)
    return docs.tokens, torch.cat([docs.lengths.new_zeros(1), docs.lengths.cumsum(0)])


def _rows(x: Tensor) -> Tensor:
    """x `[..., N]` as a matrix whose rows are contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _apply(x: Tensor, packed: Packed, scale: Tensor | None, bias: Tensor | None, counts: bool) -> Tensor:
    x = x.contiguous()
    if not torch.compiler.is_compiling():
        return _multiply(x, packed.struct, scale, bias, counts, packed.out_features)
    kind = KINDS.index(packed.kind)
    return _OPS["linear"](x, packed.weight, packed.scale, scale, bias, packed.out_features, kind, counts)


def _tokens(x: Tensor) -> _Tokens:
    return _Tokens(x.data_ptr(), TYPES[x.dtype], token_stride(x))


def _gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
    scale: float,
) -> Tensor:
    out = _for_tokens(q, v.shape[3], tokens, q.dtype)
    call = _recurrence(q, k, v, log_decay, tokens, starts, scale, slots=slots, pool=pool, out=out)
    library().gated_linear(ctypes.addressof(call), len(starts) - 1, torch.get_num_threads())
    return out


def _for_tokens(x: Tensor, width: int, tokens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[B, T, H, width]` to be written for the tokens of documents; zeros where there may be others."""
    new = x.new_empty if tokens is None else x.new_zeros
    return new(*x.shape[:3], width, dtype=dtype)


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
        *(_tokens(x) for x in (q, k, v, log_decay)),
        *(address(x) for x in (tokens, starts, slots, pool, out)),
        scale,
        *(q.shape[2], k.shape[2], k.shape[3], v.shape[3], log_decay.shape[3]),
        address(kept),
    )


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
    library().gated_linear(ctypes.addressof(call), len(starts) - 1, torch.get_num_threads())
    return out, state, kept


def _results_kept(
    q: Tensor, v: Tensor, state: Tensor, tokens: Tensor | None, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = q.shape[0] * q.shape[1] // CHUNK + len(starts) - 1
    kept = state.new_empty(chunks, *state.shape[1:])
    return _for_tokens(q, v.shape[3], tokens, q.dtype), state.clone(memory_format=torch.contiguous_format), kept


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
    found = tuple(_for_tokens(x, x.shape[3], tokens, torch.float32) for x in inputs)
    out, state = out.float().contiguous(), state.contiguous()
    first = torch.empty_like(state)
    gradients = _Gradients(*(address(x) for x in (out, state, *found, first)))
    call = _recurrence(*inputs, tokens, starts, scale, kept=kept)
    threads = torch.get_num_threads()
    library().gated_linear_backward(ctypes.addressof(call), ctypes.addressof(gradients), len(starts) - 1, threads)
    query, key, value, decay = found
    return query, key, value, decay, first


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, _, tokens, starts, scale = inputs
    ctx.save_for_backward(q, k, v, log_decay, output[2], tokens, starts)
    ctx.scale = scale


def _backward_of_kept(ctx: Any, out: Tensor, state: Tensor, _kept: Tensor) -> tuple[Tensor | None, ...]:
    # Once only: activation checkpointing lets what was saved be taken out a single time.
    saved = ctx.saved_tensors
    *found, first = _OPS["gated_linear_backward"](out, state, *saved, ctx.scale)
    return *(x.to(like.dtype) for x, like in zip(found, saved, strict=False)), first, None, None, None


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
    out = _for_tokens(q, v.shape[3], tokens, q.dtype)
    call = _attention(q, k, v, sinks, tokens, starts, first, window, scale, pool=pool, slots=slots, out=out)
    library().window_attention(ctypes.addressof(call), len(starts) - 1, torch.get_num_threads())
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
        *(_tokens(x) for x in (q, k, v)),
        *(address(x) for x in (tokens, starts, first, slots, pool)),
        *(pool_type, capacity, address(out), scale),
        *(address(sinks), 0 if sinks is None else len(sinks), q.shape[2], k.shape[2], k.shape[3], window),
        address(kept),
    )


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
    out, kept = _for_tokens(q, v.shape[3], tokens, q.dtype), _for_tokens(q, 1, tokens, torch.float32)
    call = _attention(q, k, v, sinks, tokens, starts, first, window, scale, out=out, kept=kept)
    library().window_attention(ctypes.addressof(call), len(starts) - 1, torch.get_num_threads())
    return out, kept


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
    key, value = (_for_tokens(x, x.shape[3], tokens, torch.float32) for x in (k, v))
    sink = _for_sinks(k, sinks, starts)
    gradients = _AttentionGradients(*(address(x) for x in (gradient, delta, query, key, value, sink)))
    call = _attention(q, k, v, sinks, tokens, starts, first, window, scale, kept=kept)
    threads = torch.get_num_threads()
    library().window_attention_backward(ctypes.addressof(call), ctypes.addressof(gradients), len(starts) - 1, threads)
    return query, key, value, sink


def _for_sinks(k: Tensor, sinks: Tensor | None, starts: Tensor) -> Tensor:
    """`[D, S, 2, H_kv, K]` to be written; S = 0 without sinks."""
    count = 0 if sinks is None else len(sinks)
    return k.new_empty(len(starts) - 1, count, 2, *k.shape[2:], dtype=torch.float32)


def _keep_attention_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = window, scale


def _backward_of_kept_attention(ctx: Any, gradient: Tensor, _kept: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    q, k, v, sinks, *_ = saved
    *found, sink = _OPS["window_attention_backward"](gradient, *saved, *ctx.options)
    found = [x.to(like.dtype) for x, like in zip(found, (q, k, v), strict=True)]
    return *found, None if sinks is None else sink.sum(0), None, None, None, None, None


def _linear(
    x: Tensor,
    weight: Tensor,
    group_scale: Tensor | None,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    kind: int,
    counts: bool,
) -> Tensor:
    in_features = x.shape[-1]
    packed = CPacked(address(weight), address(group_scale), in_features, out_features, PANEL, kind)
    return _multiply(x, packed, token_scale, bias, counts, out_features)


def _multiply(
    x: Tensor, packed: CPacked, token_scale: Tensor | None, bias: Tensor | None, counts: bool, out_features: int
) -> Tensor:
    out = x.new_empty(*x.shape[:-1], out_features, dtype=torch.float32 if x.dtype == torch.int16 else x.dtype)
    library().linear(
        *(ctypes.addressof(packed), x.data_ptr(), TYPES[x.dtype], address(token_scale), address(bias)),
        *(out.data_ptr(), TYPES[out.dtype], out.numel() // max(1, out_features), counts),
        *(BREAK_EVEN_ROWS, torch.get_num_threads()),
    )
    return out


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // max(1, width)
    data = (x.data_ptr(), TYPES[x.dtype], weight.data_ptr())
    library().rms_norm(*data, epsilon, rows, width, out.data_ptr(), torch.get_num_threads())
    return out


def _encode_adaptive(x: Tensor, k: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    counts, width = torch.empty_like(x), x.shape[-1]
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    data = (x.data_ptr(), TYPES[x.dtype], k, low, high)
    library().encode_adaptive(*data, scale.numel(), width, counts.data_ptr(), scale.data_ptr(), torch.get_num_threads())
    return counts, scale


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out, width = gate.new_empty(gate.shape), gate.shape[-1]
    rows = gate.numel() // max(1, width)
    data = (gate.data_ptr(), up.data_ptr(), TYPES[gate.dtype], rows, width, gate.stride(0))
    library().swiglu(*data, out.data_ptr(), torch.get_num_threads())
    return out


def _log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    out, width = x.new_empty(x.shape, dtype=torch.float32), x.shape[-1]
    size = (x.numel() // max(1, width), width, x.stride(0))
    library().log_sigmoid(x.data_ptr(), TYPES[x.dtype], divisor, *size, out.data_ptr(), torch.get_num_threads())
    return out


def _rotary(x: Tensor, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    out, tokens = x.new_empty(x.shape), _tokens(x)
    angles = (positions.data_ptr(), frequencies.data_ptr(), factor)
    size = (x.shape[0] * x.shape[1], x.shape[2], x.shape[3], tokens.stride)
    library().rotary(tokens.data, tokens.type, *angles, *size, out.data_ptr(), torch.get_num_threads())
    return out


_OPS = {
    "gated_linear_": custom_op("spikingbrain::gated_linear_", _gated_linear, mutates_args=("pool",)),
    "gated_linear_kept": custom_op("spikingbrain::gated_linear_kept", _gated_linear_kept, mutates_args=()),
    "gated_linear_backward": custom_op("spikingbrain::gated_linear_backward", _gated_linear_backward, mutates_args=()),
    "window_attention_": custom_op("spikingbrain::window_attention_", _window_attention, mutates_args=("pool",)),
    "window_attention_kept": custom_op("spikingbrain::window_attention_kept", _window_attention_kept, mutates_args=()),
    "window_attention_backward": custom_op(
        "spikingbrain::window_attention_backward", _window_attention_backward, mutates_args=()
    ),
    "linear": custom_op("spikingbrain::linear", _linear, mutates_args=()),
    "rms_norm": custom_op("spikingbrain::rms_norm", _rms_norm, mutates_args=()),
    "encode_adaptive": custom_op("spikingbrain::encode_adaptive", _encode_adaptive, mutates_args=()),
    "log_sigmoid": custom_op("spikingbrain::log_sigmoid", _log_sigmoid, mutates_args=()),
    "rotary": custom_op("spikingbrain::rotary", _rotary, mutates_args=()),
    "swiglu": custom_op("spikingbrain::swiglu", _swiglu, mutates_args=()),
}

_OPS["gated_linear_kept"].register_autograd(_backward_of_kept, setup_context=_keep_for_backward)
_OPS["window_attention_kept"].register_autograd(_backward_of_kept_attention, setup_context=_keep_attention_for_backward)


@_OPS["gated_linear_kept"].register_fake
def _(q, k, v, log_decay, state, tokens, starts, scale):  # noqa: ARG001
    return _results_kept(q, v, state, tokens, starts)


@_OPS["gated_linear_backward"].register_fake
def _(out, state, q, k, v, log_decay, kept, tokens, starts, scale):  # noqa: ARG001
    return *(x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v, log_decay)), torch.empty_like(state)


@_OPS["gated_linear_"].register_fake
def _(q, k, v, log_decay, pool, slots, tokens, starts, scale):  # noqa: ARG001
    return q.new_empty(*q.shape[:3], v.shape[3])


@_OPS["window_attention_"].register_fake
def _(q, k, v, sinks, pool, slots, tokens, starts, first, window, scale):  # noqa: ARG001
    return q.new_empty(*q.shape[:3], v.shape[3])


@_OPS["window_attention_kept"].register_fake
def _(q, k, v, sinks, tokens, starts, first, window, scale):  # noqa: ARG001
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)


@_OPS["window_attention_backward"].register_fake
def _(gradient, q, k, v, sinks, tokens, starts, first, out, kept, window, scale):  # noqa: ARG001
    return *(x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v)), _for_sinks(k, sinks, starts)


@_OPS["linear"].register_fake
def _(x, weight, group_scale, token_scale, bias, out_features, kind, counts):  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], out_features, dtype=torch.float32 if x.dtype == torch.int16 else x.dtype)


@_OPS["rms_norm"].register_fake
def _(x, weight, epsilon):  # noqa: ARG001
    return torch.empty_like(x)


@_OPS["encode_adaptive"].register_fake
def _(x, k, low, high):  # noqa: ARG001
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@_OPS["swiglu"].register_fake
def _(gate, up):  # noqa: ARG001
    return gate.new_empty(gate.shape)


@_OPS["log_sigmoid"].register_fake
def _(x, divisor):  # noqa: ARG001
    return x.new_empty(x.shape, dtype=torch.float32)


@_OPS["rotary"].register_fake
def _(x, positions, frequencies, factor):  # noqa: ARG001
    return x.new_empty(x.shape)
