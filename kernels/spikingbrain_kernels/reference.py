"""Every op as a plain recurrence over tokens: the specification that other backends are tested against.

Works in fp64 and in fp32 (half precision is computed in fp32). B batch, T tokens, H heads, K key and V value width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .backends import state_dtype
from .layout import Documents, documents
from .packed import GROUP, Packed


def _recur(
    docs: Documents, state: Tensor, shape: tuple[int, ...], step: Callable[[int, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """`step(t, memory) -> (out, memory)` over the tokens of each document; outs `shape` (a masked token's is zero)."""
    out = torch.zeros(shape, dtype=state.dtype, device=state.device)
    states = []
    for memory, tokens in zip(state, docs.tokens.split(docs.lengths.tolist()), strict=True):
        for t in tokens.tolist():
            result, memory = step(t, memory)
            out = out.index_put((torch.tensor(t),), result)
        states.append(memory)
    return out, torch.stack(states)


def gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp g_t) S_{t-1} + k_t^T v_t;  o_t = scale * q_t S_t  (GLA, arXiv 2312.06635, eq. 3)."""
    docs = documents(q.shape[0], q.shape[1], cu_seqlens, mask, q.device)
    groups = q.shape[2] // k.shape[2]
    q, k, v, decay = (x.flatten(0, 1).to(state.dtype) for x in (q, k, v, log_decay.exp()))

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = decay[t, :, :, None] * memory + k[t, :, :, None] * v[t, :, None, :]
        return scale * torch.einsum("hk,hkv->hv", q[t], memory.repeat_interleave(groups, dim=0)), memory

    return _recur(docs, state, (*q.shape[:2], v.shape[-1]), step)


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S' = exp(g_t) S_{t-1};  S_t = S' + beta_t k_t^T (v_t - k_t S');  o_t = scale * q_t S_t  (arXiv 2412.06464)."""
    docs = documents(q.shape[0], q.shape[1], cu_seqlens, mask, q.device)
    groups = q.shape[2] // k.shape[2]
    q, k, v, beta, decay = (x.flatten(0, 1).to(state.dtype) for x in (q, k, v, beta, log_decay.exp()))

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = decay[t, :, :, None] * memory
        error = beta[t] * (v[t] - torch.einsum("hk,hkv->hv", k[t], memory))
        memory = memory + k[t, :, :, None] * error[:, None, :]
        return scale * torch.einsum("hk,hkv->hv", q[t], memory.repeat_interleave(groups, dim=0)), memory

    return _recur(docs, state, (*q.shape[:2], v.shape[-1]), step)


def wkv(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    *,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o_t = (sum_{i<t} e^{(t-1-i)w + k_i} v_i + e^{u + k_t} v_t) / (the same without v)  (RWKV-4, arXiv 2305.13048).

    w = -e^time_decay, u = time_first.
    `state [D, 3, C]`: numerator and denominator divided by e^m, and m, the largest exponent so far. The result does not
    depend on m, so no gradient goes through it.
    """
    docs = documents(k.shape[0], k.shape[1], cu_seqlens, mask, k.device)
    k, v = (x.flatten(0, 1).to(state.dtype) for x in (k, v))
    w, u = -time_decay.to(state.dtype).exp(), time_first.to(state.dtype)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        numerator, denominator, top = memory
        top = top.masked_fill(denominator == 0, -torch.inf)
        largest = torch.maximum(top, u + k[t]).detach()
        old, new = (top - largest).exp(), (u + k[t] - largest).exp()
        out = (old * numerator + new * v[t]) / (old * denominator + new)
        largest = torch.maximum(top + w, k[t]).detach()
        old, new = (top + w - largest).exp(), (k[t] - largest).exp()
        return out, torch.stack([old * numerator + new * v[t], old * denominator + new, largest])

    return _recur(docs, state, k.shape, step)


def lif_scan(
    x: Tensor,
    *,
    tau: float,
    v_th: float,
    v_reset: float | None,
    decay_input: bool,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire over tokens: h_t = leak(v_{t-1}) + x_t, s_t = [h_t >= v_th], v_t = h_t after the reset.

    Gradient of s_t with respect to h_t: that of the arc tangent, 1 / (1 + (pi (h_t - v_th))^2); the reset passes it on.
    """
    docs = documents(x.shape[0], x.shape[1], cu_seqlens, mask, x.device)
    x = x.flatten(0, 1).to(state.dtype)
    rest = v_reset or 0.0

    def step(t: int, membrane: Tensor) -> tuple[Tensor, Tensor]:
        if decay_input:
            charged = membrane + (x[t] - (membrane - rest)) / tau
        else:
            charged = membrane - (membrane - rest) / tau + x[t]
        smooth = torch.atan(torch.pi * (charged - v_th)) / torch.pi
        spike = (charged >= v_th).to(x.dtype) + (smooth - smooth.detach())
        if v_reset is None:
            return spike, charged - spike * v_th
        return spike, (1 - spike) * charged + spike * v_reset

    return _recur(docs, state, x.shape, step)


def short_conv(
    x: Tensor, weight: Tensor, *, state: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = sum_i weight[:, N - 1 - i] * x_{t-i}: `state [D, N - 1, C]`: the last inputs, in order."""
    docs = documents(x.shape[0], x.shape[1], cu_seqlens, mask, x.device)
    dtype = state_dtype(x.dtype)
    x, taps = x.flatten(0, 1).to(dtype), weight.to(dtype).T

    def step(t: int, past: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat([past, x[t : t + 1]])
        return (taps * window).sum(0), window[1:]

    out, last = _recur(docs, state.to(dtype), x.shape, step)
    return out, last.to(state.dtype)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    positions: Tensor,
    scale: float,
    sinks: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each token over the sinks, itself and the `window - 1` tokens before it in its document.

    `state [D, capacity, 2, H_kv, V]` is a ring: the token at position p lies in place p mod capacity.
    """
    docs = documents(q.shape[0], q.shape[1], cu_seqlens, mask, q.device)
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.flatten(0, 1).to(state_dtype(x.dtype)) for x in (q, k, v))
    position = positions.flatten().tolist()
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=v.dtype, device=q.device)
    rings = []
    for number, tokens in enumerate(docs.tokens.split(docs.lengths.tolist())):
        seen = position[tokens[0]] if len(tokens) else 0
        old = range(0) if state is None else range(max(0, seen - state.shape[1]), seen)
        ring = {p: state[number, p % state.shape[1]].to(k.dtype) for p in old}
        for t in tokens.tolist():
            p = position[t]
            ring[p] = torch.stack([k[t], v[t]])
            visible = torch.stack([ring[i] for i in range(max(0, p - window + 1), p + 1) if i in ring])
            visible = visible if sinks is None else torch.cat([sinks.to(k.dtype), visible])
            keys, values = visible.repeat_interleave(groups, dim=2).unbind(1)
            weights = torch.softmax(scale * torch.einsum("hk,nhk->hn", q[t], keys), dim=-1)
            out = out.index_put((torch.tensor(t),), torch.einsum("hn,nhv->hv", weights, values))
        if state is not None:
            capacity, memory = state.shape[1], state[number]
            for p in sorted(ring)[-capacity:]:
                memory = memory.index_put((torch.tensor(p % capacity),), ring[p].to(memory.dtype))
            rings.append(memory)
    return out, None if state is None else torch.stack(rings)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x W^T + b, groups of int8 weights scaled one by one."""
    wide = x.to(state_dtype(x.dtype))
    out = _product(wide, packed, wide.dtype)
    return (out if bias is None else out + bias).to(x.dtype)


def spike_linear(counts: Tensor, scale: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """scale * (counts W^T) + b; the sums within a group are exact, and added in order over each half of the groups."""
    out = _product(counts.double(), packed, torch.float32) * scale
    return (out if bias is None else out + bias).to(counts.dtype if counts.is_floating_point() else torch.float32)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean x^2 + epsilon) * weight."""
    wide = x.to(state_dtype(x.dtype))
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * weight).to(x.dtype)


def encode_adaptive(x: Tensor, k: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    """round(x / s), s = clamp(mean|x| / k, low, high)."""
    wide = x.to(state_dtype(x.dtype))
    scale = (wide.abs().mean(-1, keepdim=True) / k).clamp(low, high)
    return (wide / scale).round().to(x.dtype), scale


def encode_dead_zone(
    x: Tensor, theta: Tensor, k: Tensor, least_k: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """round(x / s) where |x| >= theta m, else 0; m = clamp(mean|x|, low, high), s = m / max(k, least_k)."""
    wide = x.to(state_dtype(x.dtype))
    mean = wide.abs().mean(-1, keepdim=True).clamp(low, high)
    scale = mean / k.to(wide.dtype).clamp(min=least_k)
    fires = wide.abs() / mean >= theta.to(wide.dtype)
    return ((wide / scale).round() * fires).to(x.dtype), scale


def rms_norm_encode(
    x: Tensor, weight: Tensor, epsilon: float, k: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The norm, then the counts and their scale."""
    return encode_adaptive(rms_norm(x, weight, epsilon), k, low, high)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


def log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    """log(sigmoid(x)) / divisor."""
    return torch.nn.functional.logsigmoid(x.to(state_dtype(x.dtype))) / divisor


def rotary(x: Tensor, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Turn the pairs (i, i + K / 2) of each head."""
    angles = (positions[..., None].float() * frequencies)[:, :, None]
    cos, sin = ((part * factor).to(x.dtype) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _product(x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    weight, scale = (None if part is None else part.to(x.device) for part in packed.dense())
    if scale is None:
        return (x @ weight.to(x.dtype).T).to(dtype)
    halves = torch.zeros(2, *x.shape[:-1], packed.out_features, dtype=dtype, device=x.device)
    groups = weight.split(GROUP, dim=1)
    for group, codes in enumerate(groups):
        here = x[..., group * GROUP : (group + 1) * GROUP]
        half = int(group >= (len(groups) + 1) // 2)
        halves[half] += scale[:, group].to(dtype) * (here @ codes.to(x.dtype).T).to(dtype)
    return halves[0] + halves[1]
