"""What lies between the products, one pass over a row each."""

from typing import Any

import torch
from torch import Tensor

from ..layout import by_token
from ..library import TYPES, address, library
from .calls import kernel, tokens_of


def rms_norm_encode(
    x: Tensor, weight: Tensor, epsilon: float, k: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The norm, then the counts and their scale."""
    return encode_adaptive(rms_norm(x, weight, epsilon), k, low, high)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension; `weight` in fp32."""
    return _rms_norm(x.contiguous(), weight, epsilon)


def encode_adaptive(x: Tensor, k: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Counts `round(x / scale)` in x's type and scale `clamp(mean|x| / k, low, high) [..., 1]`."""
    return _encode_adaptive(x.contiguous(), k, low, high)


def encode_dead_zone(
    x: Tensor, theta: Tensor, k: Tensor, least_k: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Counts `round(x / scale)` in x's type, 0 below `theta [C]` times the mean, and scale `mean|x| / k [..., 1]`."""
    if theta.dtype not in TYPES:
        theta, k = theta.float(), k.float()
    return _encode_dead_zone(x.contiguous(), theta.contiguous(), k.to(theta.dtype), least_k, low, high)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; each `[..., N]`."""
    first, second = _rows(gate), _rows(up)
    if first.stride(0) != second.stride(0):
        first, second = first.contiguous(), second.contiguous()
    return _swiglu(first, second).view(gate.shape)


def log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    """log(sigmoid(x)) / divisor in fp32; x `[..., N]`."""
    return _log_sigmoid(_rows(x), divisor).view(x.shape)


def rotary(x: Tensor, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Turn the pairs of x's heads by position * frequency."""
    return _rotary(by_token(x), positions.contiguous(), frequencies, factor)


def _rows(x: Tensor) -> Tensor:
    """x `[..., N]` as a matrix whose rows are contiguous."""
    if x.is_contiguous():
        return x.view(-1, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _in_fp32(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _counts_and_scale(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@kernel("rms_norm", _like_first)
def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out, width = x.new_empty(x.shape), x.shape[-1]
    rows = x.numel() // max(1, width)
    data = (address(x), TYPES[x.dtype], address(weight))
    library().rms_norm(*data, epsilon, rows, width, address(out), torch.get_num_threads())
    return out


@kernel("encode_adaptive", _counts_and_scale)
def _encode_adaptive(x: Tensor, k: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    (counts, scale), width = _counts_and_scale(x), x.shape[-1]
    data = (address(x), TYPES[x.dtype], k, low, high)
    library().encode_adaptive(*data, scale.numel(), width, address(counts), address(scale), torch.get_num_threads())
    return counts, scale


@kernel("encode_dead_zone", _counts_and_scale)
def _encode_dead_zone(
    x: Tensor, theta: Tensor, k: Tensor, least_k: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    (counts, scale), width = _counts_and_scale(x), x.shape[-1]
    data = (address(x), TYPES[x.dtype], address(theta), address(k), TYPES[theta.dtype], least_k, low, high)
    library().encode_dead_zone(*data, scale.numel(), width, address(counts), address(scale), torch.get_num_threads())
    return counts, scale


def _like_both(_: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@kernel("swiglu_backward", _like_both)
def _swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    to_gate, to_up = _like_both(gradient, gate, up)
    gradient, width = gradient.contiguous(), gate.shape[-1]
    rows = gate.numel() // max(1, width)
    data = (address(gate), address(up), TYPES[gate.dtype], rows, width, gate.stride(0))
    results = (address(gradient), address(to_gate), address(to_up))
    library().swiglu_backward(*data, *results, torch.get_num_threads())
    return to_gate, to_up


@kernel("swiglu", _like_first, backward=_swiglu_backward)
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out, width = gate.new_empty(gate.shape), gate.shape[-1]
    rows = gate.numel() // max(1, width)
    data = (address(gate), address(up), TYPES[gate.dtype], rows, width, gate.stride(0))
    library().swiglu(*data, address(out), torch.get_num_threads())
    return out


@kernel("log_sigmoid", _in_fp32)
def _log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    out, width = x.new_empty(x.shape, dtype=torch.float32), x.shape[-1]
    size = (x.numel() // max(1, width), width, x.stride(0))
    library().log_sigmoid(address(x), TYPES[x.dtype], divisor, *size, address(out), torch.get_num_threads())
    return out


def _turn_back(
    gradient: Tensor, _: Tensor, positions: Tensor, frequencies: Tensor, factor: float
) -> tuple[Tensor | None, ...]:
    return rotary(gradient, positions, -frequencies, factor), None, None, None


@kernel("rotary", _like_first, backward=_turn_back)
def _rotary(x: Tensor, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    out, tokens = x.new_empty(x.shape), tokens_of(x)
    angles = (address(positions), address(frequencies), factor)
    size = (x.shape[0] * x.shape[1], x.shape[2], x.shape[3], tokens.stride)
    library().rotary(tokens.data, tokens.type, *angles, *size, address(out), torch.get_num_threads())
    return out
