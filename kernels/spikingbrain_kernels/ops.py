"""The ops as models call them: arguments checked, backend chosen, states from outside or in a pool.

Shapes: q `[B, T, H, K]`, k `[B, T, H_kv, K]`, v `[B, T, H_kv, V]`; query head h reads group h // (H / H_kv). Ops that
treat each channel alone take `[B, T, C]`.
Ragged batches: `mask [B, T]` (False: the token does not exist) or `cu_seqlens [D + 1]` (one row holds D documents).
Each op has two entries: the plain one writes to nothing it was given; `op_step_` (and the plain one given `Slots` for
a state) updates the states in a pool's slots.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from .backends import resolve, state_dtype, works_in_place
from .packed import Packed
from .slots import Carrier, Slots

P = ParamSpec("P")


def in_pool(op: Callable[P, Any]) -> Callable[P, Any]:
    """Let `state` be `Slots`: read the rows, run the op, write the rows back, return the same slots as new state.

    A backend that works in place gets the slots themselves. A state that is a `Carrier` runs the op itself. Under
    autocast an op computes in the types it is given: decays and states are fp32 for a reason.
    """

    name = op.__name__

    def run(*args: Any, **kwargs: Any) -> Any:
        slots = kwargs.get("state")
        if isinstance(slots, Carrier):
            return slots.carry(op, *args, **{**kwargs, "state": None})
        if not isinstance(slots, Slots) or _works_in_place(name, kwargs.get("backend"), slots, args):
            return op(*args, **kwargs)
        kwargs["state"] = slots.read()
        out, rows = op(*args, **kwargs)
        slots.write_(rows)
        return out, slots

    @wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        first: Any = args[0]
        device = "cpu" if first.is_cpu else first.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return run(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return run(*args, **kwargs)

    return call


def _works_in_place(op: str, backend: Any, slots: Slots, inputs: tuple[Any, ...]) -> bool:
    return slots.pool.is_contiguous() and works_in_place(op, backend, *inputs)


def _as(out: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a backend gave, in the shape and type that the op promises."""
    out = out if out.shape == shape else out.view(shape)
    return out if out.dtype == dtype else out.to(dtype)


def _tensors(state: Tensor | Slots | None) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else []


@in_pool
def gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | Slots | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t.

    `log_decay [B, T, H_kv, K]` or `[B, T, H_kv, 1]`, <= 0. Returns o `[B, T, H, V]` in v's type and the state
    `[B or D, H_kv, K, V]` in fp32 (fp64 for fp64 inputs), zero at first. Raises ValueError for shapes that do not fit.
    """
    _check_heads(q, k, v)
    if log_decay.shape[:3] != k.shape[:3] or log_decay.shape[3] not in (1, k.shape[3]):
        raise ValueError(f"log_decay {tuple(log_decay.shape)} fits neither {tuple(k.shape)} nor one value a head")
    if state is None:
        state = _first_state(q, cu_seqlens, k.shape[2], k.shape[3], v.shape[3])
    run = resolve("gated_linear", backend, q, k, v, log_decay, *_tensors(state))
    out, state = run(q, k, v, log_decay, scale=scale, state=state, cu_seqlens=cu_seqlens, mask=mask)
    return _as(out, (*q.shape[:3], v.shape[3]), v.dtype), state


@in_pool
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | Slots | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Gated delta rule: S' = exp(g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'), o_t = scale * q_t S_t.

    `beta`, `log_decay [B, T, H_kv, 1]`, log_decay <= 0; stable where beta |k|^2 <= 2. Returns o `[B, T, H, V]` in v's
    type and the state as `gated_linear` does. Raises ValueError for shapes that do not fit.
    """
    _check_heads(q, k, v)
    if beta.shape != (*k.shape[:3], 1) or log_decay.shape != beta.shape:
        raise ValueError(
            f"beta {tuple(beta.shape)} and log_decay {tuple(log_decay.shape)} must be {(*k.shape[:3], 1)}: one a head"
        )
    if state is None:
        state = _first_state(q, cu_seqlens, k.shape[2], k.shape[3], v.shape[3])
    run = resolve("gated_delta", backend, q, k, v, beta, log_decay, *_tensors(state))
    out, state = run(q, k, v, beta, log_decay, scale=scale, state=state, cu_seqlens=cu_seqlens, mask=mask)
    return _as(out, (*q.shape[:3], v.shape[3]), v.dtype), state


@in_pool
def wkv(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    *,
    state: Tensor | Slots | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """RWKV-4's weighted mean of values: those before by e^{k - age * e^time_decay}, this one by e^{k + time_first}.

    `k, v [B, T, C]`, `time_decay, time_first [C]`. Returns o in v's type and the state `[B or D, 3, C]` in fp32: the
    sums of weighted values and of weights, both divided by e^m, and m, the largest exponent so far; zero is empty.
    Raises ValueError for shapes that do not fit.
    """
    if k.shape != v.shape or k.dim() != 3 or time_decay.shape != k.shape[2:] or time_first.shape != k.shape[2:]:
        raise ValueError(
            f"shapes do not fit: k {tuple(k.shape)}, v {tuple(v.shape)}, time_decay {tuple(time_decay.shape)}, "
            f"time_first {tuple(time_first.shape)}"
        )
    if state is None:
        state = _first_state(k, cu_seqlens, 3, k.shape[2])
    run = resolve("wkv", backend, k, v, time_decay, time_first, *_tensors(state))
    out, state = run(k, v, time_decay, time_first, state=state, cu_seqlens=cu_seqlens, mask=mask)
    return _as(out, v.shape, v.dtype), state


@in_pool
def lif_scan(
    x: Tensor,
    *,
    tau: float,
    v_th: float,
    v_reset: float | None,
    decay_input: bool,
    state: Tensor | Slots | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Leaky integrate-and-fire neurons whose time is the sequence: one a channel, its membrane is the state.

    The membrane leaks towards `v_reset` (0 if None) with time constant `tau` >= 1 tokens and takes in x, or x / tau
    with `decay_input`; at `v_th` it fires and goes to `v_reset`, or (None: soft reset) loses `v_th`. The gradient of a
    spike is that of arctan(pi (h - v_th)) / pi, through the reset too. `x [B, T, C]` -> spikes, 0 or 1, in x's type and
    the membrane `[B or D, C]` in fp32, zero at first. Raises ValueError for shapes or a tau that do not fit.
    """
    if x.dim() != 3 or tau < 1:
        raise ValueError(f"x must be [B, T, C] and tau at least 1; got {tuple(x.shape)} and {tau}")
    if state is None:
        state = _first_state(x, cu_seqlens, x.shape[2])
    run = resolve("lif_scan", backend, x, *_tensors(state))
    neuron = {"tau": tau, "v_th": v_th, "v_reset": v_reset, "decay_input": decay_input}
    spikes, membrane = run(x, **neuron, state=state, cu_seqlens=cu_seqlens, mask=mask)
    return _as(spikes, x.shape, x.dtype), membrane


@in_pool
def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    state: Tensor | Slots | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Causal depthwise convolution: `x [B, T, C]`, `weight [C, N]`, whose last tap is the token's own.

    Returns y in x's type and the state `[B or D, N - 1, C]`: the last inputs, the newest last, zero at first; a state
    keeps its own type. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(f"shapes do not fit: x {tuple(x.shape)}, weight {tuple(weight.shape)}")
    if state is None:
        state = _first_state(x, cu_seqlens, weight.shape[1] - 1, x.shape[2]).to(x.dtype)
    run = resolve("short_conv", backend, x, weight, *_tensors(state))
    out, state = run(x, weight, state=state, cu_seqlens=cu_seqlens, mask=mask)
    return _as(out, x.shape, x.dtype), state


@in_pool
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    positions: Tensor,
    scale: float | None = None,
    sinks: Tensor | None = None,
    state: Tensor | Slots | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Softmax attention over a window: a query sees itself and the `window - 1` tokens before it.

    `positions [B, T]`: each token's index in its document. `state [B or D, capacity, 2, H_kv, D]`: a ring in which the
    token at position p lies in place p mod capacity (capacity >= window, or >= the length for attention over
    everything). Without a state nothing came before and none is returned. `sinks [S, 2, H_kv, D]`: keys and values that
    every query sees besides (arXiv 2509.05276, section 2.2). Raises ValueError for shapes that do not fit.
    """
    _check_heads(q, k, v)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if sinks is not None and sinks.shape[1:] != (2, *k.shape[2:]):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [S, 2, {k.shape[2]}, {k.shape[3]}]")
    run = resolve("window_attention", backend, q, k, v, *_tensors(state), *_tensors(sinks))
    out, state = run(
        q if q.dtype == v.dtype else q.to(v.dtype),
        k if k.dtype == v.dtype else k.to(v.dtype),
        v,
        window=window,
        positions=_positions(positions, q),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        sinks=sinks,
        state=state,
        cu_seqlens=cu_seqlens,
        mask=mask,
    )
    return _as(out, (*q.shape[:3], v.shape[3]), v.dtype), state


def gated_linear_step_(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, pool: Tensor, slots: Tensor, **options: Any
) -> Tensor:
    """`gated_linear` with the states in `slots [B]` of `pool`, updated in place; slot -1 is padding."""
    return gated_linear(q, k, v, log_decay, state=Slots(pool, slots), **options)[0]


def gated_delta_step_(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, *, pool: Tensor, slots: Tensor, **options: Any
) -> Tensor:
    """`gated_delta` with the states in `slots [B]` of `pool`, updated in place; slot -1 is padding."""
    return gated_delta(q, k, v, beta, log_decay, state=Slots(pool, slots), **options)[0]


def wkv_step_(
    k: Tensor, v: Tensor, time_decay: Tensor, time_first: Tensor, *, pool: Tensor, slots: Tensor, **options: Any
) -> Tensor:
    """`wkv` with the states in `slots [B]` of `pool`, updated in place; slot -1 is padding."""
    return wkv(k, v, time_decay, time_first, state=Slots(pool, slots), **options)[0]


def lif_scan_step_(x: Tensor, *, pool: Tensor, slots: Tensor, **options: Any) -> Tensor:
    """`lif_scan` with the membranes in `slots [B]` of `pool`, updated in place; slot -1 is padding."""
    return lif_scan(x, state=Slots(pool, slots), **options)[0]


def short_conv_step_(x: Tensor, weight: Tensor, *, pool: Tensor, slots: Tensor, **options: Any) -> Tensor:
    """`short_conv` with the last inputs in `slots [B]` of `pool`, updated in place; slot -1 is padding."""
    return short_conv(x, weight, state=Slots(pool, slots), **options)[0]


def window_attention_step_(q: Tensor, k: Tensor, v: Tensor, *, pool: Tensor, slots: Tensor, **options: Any) -> Tensor:
    """`window_attention` with the rings in `slots [B]` of `pool`, updated in place; slot -1 is padding."""
    return window_attention(q, k, v, state=Slots(pool, slots), **options)[0]


def _first_state(x: Tensor, cu_seqlens: Tensor | None, *shape: int) -> Tensor:
    """Zeros `[B or D, *shape]` in the type of recurrent states."""
    rows = len(cu_seqlens) - 1 if cu_seqlens is not None else x.shape[0]
    return x.new_zeros(rows, *shape, dtype=state_dtype(x.dtype))


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x W^T + b for packed weights: x `[..., in]` -> `[..., out]` in x's type, sums in fp32, `bias [out]` in fp32.

    A row's result does not depend on the rows beside it. For inference: raises `BackendError` where x needs a gradient.
    """
    _check_features(x, packed)
    return resolve("linear", backend, x)(x, packed, bias)


def spike_linear(
    counts: Tensor, scale: Tensor, packed: Packed, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """scale * (counts W^T) + b for whole numbers `counts [..., in]` and `scale [..., 1]`, in the type of `counts`.

    int8 weights: exact integer sums over groups of 128 inputs, scaled and added in order over each half of the groups.
    Only the weights of channels that fired are read, where that is faster; the result is the same. Counts that are no
    whole numbers of 16 bits are multiplied as floats.
    """
    _check_features(counts, packed)
    if not (counts.is_floating_point() or counts.dtype == torch.int16):
        raise ValueError(f"counts are floats or int16, not {counts.dtype}")
    scale = scale.float().contiguous()
    first = (counts, scale) if counts.is_floating_point() else (scale, counts)
    return resolve("spike_linear", backend, *first)(counts, scale, packed, bias)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean x^2 + epsilon) * weight over the last dimension: x `[..., N]`, `weight [N]` in fp32."""
    return resolve("rms_norm", backend, x)(x, weight, epsilon)


def encode_adaptive(
    x: Tensor, *, k: float, low: float, high: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Spike counts round(x / s) in x's type and s = clamp(mean|x| / k, low, high) `[..., 1]` (arXiv 2509.05276, 19)."""
    return resolve("encode_adaptive", backend, x)(x, k, low, high)


def encode_dead_zone(
    x: Tensor, theta: Tensor, k: Tensor, *, least_k: float, low: float, high: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Counts round(x / s) in x's type where |x| >= theta m, else 0, and s `[..., 1]` = m / max(k, least_k).

    `x [..., C]`, `theta [C]`, `k [1]`; m = clamp(mean|x|, low, high) over the channels.
    """
    return resolve("encode_dead_zone", backend, x)(x, theta, k, least_k, low, high)


def rms_norm_encode(
    x: Tensor, weight: Tensor, epsilon: float, *, k: float, low: float, high: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`encode_adaptive` of `rms_norm`: counts in x's type and their scale `[..., 1]`; one pass where it is fused."""
    return resolve("rms_norm_encode", backend, x)(x, weight, epsilon, k, low, high)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return resolve("swiglu", backend, gate, up)(gate, up)


def log_sigmoid(x: Tensor, divisor: float, *, backend: str | None = None) -> Tensor:
    """log(sigmoid(x)) / divisor in fp32 (fp64 for fp64 inputs): the logarithm of a decay (GLA, arXiv 2312.06635)."""
    return resolve("log_sigmoid", backend, x)(x, divisor)


def rotary(x: Tensor, positions: Tensor, frequencies: Tensor, factor: float, *, backend: str | None = None) -> Tensor:
    """Rotary positions (arXiv 2104.09864): x `[B, T, H, K]`, pairs (i, i + K / 2) turned by position * frequency.

    `positions [B, T]`, `frequencies [K / 2]` in fp32; the result is multiplied by `factor`.
    """
    return resolve("rotary", backend, x)(x, _positions(positions, x), frequencies, factor)


def _check_features(x: Tensor, packed: Packed) -> None:
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"{x.shape[-1]} inputs do not fit weights of {packed.in_features}")


def _positions(positions: Tensor, x: Tensor) -> Tensor:
    """One for each token of `x [B, T, ...]`."""
    return positions if positions.shape == x.shape[:2] else positions.expand(x.shape[:2])


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    first, second, third = q.shape, k.shape, v.shape
    if len(first) != 4 or first[:2] != second[:2] or second[:3] != third[:3] or first[3] != second[3]:
        raise ValueError(f"shapes do not fit: q {tuple(first)}, k {tuple(second)}, v {tuple(third)}")
    if first[2] % second[2]:
        raise ValueError(f"{first[2]} query heads cannot share {second[2]} key heads evenly")
