"""What lies between the products, each in one pass: norms, spike encoding, gates, rotary positions."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import by_token, token_stride
from .rows import FUSED, UNFUSED, on_its_device

ROW_BLOCK = 1024
# Rows longer than this take more warps, so that they stay in registers.
WIDE = 2048


@on_its_device
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean x^2 + epsilon) * weight, a program a row."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _rms_norm_kernel[_one_a_row(x)](x, weight.contiguous(), out, epsilon, **_width(x), **FUSED)
    return out


@on_its_device
def encode_adaptive(x: Tensor, k: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Counts round(x / scale), half to even, in x's type and scale clamp(mean|x| / k, low, high)."""
    return _encode(x, None, 0.0, k, low, high)


@on_its_device
def encode_dead_zone(
    x: Tensor, theta: Tensor, k: Tensor, least_k: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Counts round(x / s) where |x| >= theta m, else 0, and s = m / max(k, least_k); m = clamp(mean|x|, low, high)."""
    x, counts, scale = _rows_of_counts(x)
    limits = (float(least_k), float(low), float(high))
    _dead_zone_kernel[_one_a_row(x)](x, theta.contiguous(), k, counts, scale, *limits, **_width(x), **UNFUSED)
    return counts, scale


@on_its_device
def rms_norm_encode(x: Tensor, weight: Tensor, epsilon: float, k: float, low: float, high: float) -> Any:
    """`encode_adaptive` of `rms_norm`, which is rounded to x's type in between but never written."""
    return _encode(x, weight.contiguous(), epsilon, k, low, high)


def _encode(x: Tensor, weight: Tensor | None, epsilon: float, k: float, low: float, high: float) -> Any:
    x, counts, scale = _rows_of_counts(x)
    thresholds = (float(k), float(low), float(high))
    _encode_kernel[_one_a_row(x)](x, weight, counts, scale, epsilon, *thresholds, **_width(x), **UNFUSED)
    return counts, scale


def _rows_of_counts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x with its rows one after another, and room for its counts and what one of each row is worth."""
    counts = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.contiguous(), counts, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@on_its_device
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _swiglu_kernel[_one_a_block(gate)](gate, up, out, gate.numel(), BLOCK=ROW_BLOCK, **FUSED)
    return out


@on_its_device
def log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    """log(sigmoid(x)) / divisor in fp32."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.float32)
    _log_sigmoid_kernel[_one_a_block(x)](x, out, float(divisor), x.numel(), BLOCK=ROW_BLOCK, **FUSED)
    return out


@on_its_device
def rotary(x: Tensor, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Turn the pairs (i, i + K / 2) of each head by position * frequency; a program a token."""
    x = by_token(x)
    heads, width = x.shape[2:]
    out = x.new_empty(x.shape)
    if out.numel():
        _rotary_kernel[(x.shape[0] * x.shape[1],)](
            *(x, positions.contiguous(), frequencies, out, float(factor), token_stride(x)),
            HEADS=heads,
            HALF=width // 2,
            HEAD_BLOCK=triton.next_power_of_2(heads),
            HALF_BLOCK=triton.next_power_of_2(width // 2),
            **FUSED,
        )
    return out


def _one_a_row(x: Tensor) -> tuple[int]:
    return (max(1, x.numel() // max(1, x.shape[-1])),)


def _one_a_block(x: Tensor) -> tuple[int]:
    return (max(1, triton.cdiv(x.numel(), ROW_BLOCK)),)


def _width(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[-1])
    return {"WIDTH": x.shape[-1], "BLOCK": block, "num_warps": 4 if block <= WIDE else 16}


@triton.jit
def _normalised(x, weight, column, exists, epsilon, WIDTH: tl.constexpr):
    mean = tl.sum(x * x, 0) / WIDTH
    return x * (1 / tl.sqrt_rn(mean + epsilon)) * tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _rms_norm_kernel(x, weight, out, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * WIDTH, tl.arange(0, BLOCK)
    exists = column < WIDTH
    value = tl.load(x + row + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row + column, _normalised(value, weight, column, exists, epsilon, WIDTH), mask=exists)


@triton.jit
def _mean_magnitude(value, count):
    return tl.div_rn(tl.sum(tl.abs(value), 0), count)


@triton.jit
def _clamped(value, low, high):
    """A NaN passes through, as through torch's clamp."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def _count(value, worth):
    """value / worth rounded to whole numbers, half to even."""
    level = tl.div_rn(value, worth + tl.zeros_like(value))
    # Adding 2^23 leaves no bit for a fraction.
    size = tl.abs(level)
    rounded = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(level < 0, -rounded, rounded)


@triton.jit
def _encode_kernel(x, weight, counts, scale, epsilon, k, low, high, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    exists = column < WIDTH
    value = tl.load(x + row * WIDTH + column, mask=exists, other=0.0).to(tl.float32)
    if weight is not None:
        value = _normalised(value, weight, column, exists, epsilon, WIDTH)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    threshold = _clamped(tl.div_rn(_mean_magnitude(value, low * 0 + WIDTH), k), low, high)
    tl.store(counts + row * WIDTH + column, _count(value, threshold), mask=exists)
    tl.store(scale + row, threshold)


@triton.jit
def _dead_zone_kernel(x, theta, k, counts, scale, least_k, low, high, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    exists = column < WIDTH
    value = tl.load(x + row * WIDTH + column, mask=exists, other=0.0).to(tl.float32)
    mean = _clamped(_mean_magnitude(value, low * 0 + WIDTH), low, high)
    finest = tl.load(k).to(tl.float32)
    worth = tl.div_rn(mean, tl.where(finest < least_k, least_k, finest))
    fires = tl.div_rn(tl.abs(value), mean + tl.zeros_like(value)) >= tl.load(theta + column, mask=exists, other=0.0)
    # Multiplied, so that a NaN stays one whatever it is compared with.
    tl.store(counts + row * WIDTH + column, _count(value, worth) * tl.where(fires, 1.0, 0.0), mask=exists)
    tl.store(scale + row, worth)


@triton.jit
def _swiglu_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < size
    x = tl.load(gate + place, mask=exists, other=0.0).to(tl.float32)
    gated = (x / (1 + tl.exp(-x))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + place, gated * tl.load(up + place, mask=exists, other=0.0).to(tl.float32), mask=exists)


@triton.jit
def _log_sigmoid_kernel(x, out, divisor, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < size
    value = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(value))
    # log(1 + e) is e (1 - e / 2) where 1 + e would lose it.
    tail = tl.where(small < 1e-4, small * (1 - 0.5 * small), tl.log(1 + small))
    tl.store(out + place, (tl.where(value > 0, 0.0, value) - tail) / divisor, mask=exists)


@triton.jit
def _rotary_kernel(
    x,
    positions,
    frequencies,
    out,
    factor,
    stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pair, mask=pair < HALF, other=0.0)
    kind = x.dtype.element_ty
    cos = (tl.cos(angle) * factor).to(kind).to(tl.float32)[None, :]
    sin = (tl.sin(angle) * factor).to(kind).to(tl.float32)[None, :]
    exists = (head < HEADS) & (pair < HALF)[None, :]
    source = x + token * stride + head * 2 * HALF + pair[None, :]
    target = out + (token * HEADS + head) * 2 * HALF + pair[None, :]
    first = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=exists, other=0.0).to(tl.float32)
    tl.store(target, first * cos - second * sin, mask=exists)
    tl.store(target + HALF, second * cos + first * sin, mask=exists)
