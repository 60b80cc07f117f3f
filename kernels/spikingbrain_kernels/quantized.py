"""Weights as integers with a scale a group of inputs, and their product with spike counts.

Codes beyond int8 are kept apart with their place, so that nothing is clamped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .backends import state_dtype
from .packed import GROUP, Packed, pack_codes

INT8 = torch.iinfo(torch.int8)


class Int8Weight(NamedTuple):
    """W[o, i] = code[o, i] * scale[o, i // group].

    `codes [out, in]` int8 (0 where the code is an outlier); `scale [out, in / group]`; `outlier_index [N]` int32: flat
    places of codes outside int8, None if there are none; `outlier_code [N]` int16: what is there.
    """

    codes: Tensor
    scale: Tensor
    outlier_index: Tensor | None = None
    outlier_code: Tensor | None = None


def quantize(weight: Tensor, scale: Tensor) -> Int8Weight:
    """round(W / scale), half to even, for `weight [out, in]` and `scale [out, in / group]`; exact, never clamped.

    Raises ValueError for codes that are not finite or outside int16.
    """
    groups = weight.float().unflatten(1, (scale.shape[1], -1)) / scale.float()[..., None]
    codes = groups.round().flatten(1)
    if not bool((codes.abs() <= torch.iinfo(torch.int16).max).all()):
        raise ValueError("weight / scale is not finite or has codes outside int16")
    outside = (codes < INT8.min) | (codes > INT8.max)
    small = codes.masked_fill(outside, 0).to(torch.int8)
    if not bool(outside.any()):
        return Int8Weight(small, scale.float())
    index = outside.flatten().nonzero().squeeze(1)
    return Int8Weight(small, scale.float(), index.to(torch.int32), codes.flatten()[index].to(torch.int16))


def dequantize(weight: Int8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """W `[out, in]`."""
    codes = weight.codes.to(dtype)
    if weight.outlier_index is not None:
        codes = _put(codes, weight.outlier_index, weight.outlier_code)
    groups = codes.view(*weight.scale.shape, -1) * weight.scale.to(dtype)[..., None]
    return groups.view(weight.codes.shape)


def spike_linear(counts: Tensor, scale: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """scale * (counts W^T) + bias: `counts [..., in]`, `scale [..., 1]` -> `[..., out]` in the counts' type.

    Computed in fp32, or fp64 for fp64 counts.
    """
    dtype = state_dtype(counts.dtype)
    out = torch.nn.functional.linear(counts.to(dtype), dequantize(weight, dtype)) * scale.to(dtype)
    return (out if bias is None else out + bias).to(counts.dtype)


def pack_parts(weight: Int8Weight) -> list[Packed] | None:
    """`weight` as the exact sum of packed ones: what int8 holds of each code, and what outliers exceed it by.

    None where that cannot be: for groups other than of 128 inputs and for codes beyond twice int8.
    """
    codes, scale, index, outlier = weight
    if codes.shape[1] != GROUP * scale.shape[1]:
        return None
    if index is None:
        return [pack_codes(codes, scale)]
    near = outlier.clamp(INT8.min, INT8.max)
    far = outlier - near
    if bool(((far < INT8.min) | (far > INT8.max)).any()):
        return None
    return [pack_codes(_put(codes, index, near), scale), pack_codes(_put(torch.zeros_like(codes), index, far), scale)]


def spike_linear_parts(counts: Tensor, scale: Tensor, parts: list[Packed], bias: Tensor | None = None) -> Tensor:
    """As `spike_linear`, with the weight in parts; only the weights of channels that fired are read."""
    first, *rest = parts
    out = ops.spike_linear(counts, scale, first, bias)
    for part in rest:
        out = out + ops.spike_linear(counts, scale, part)
    return out


def _put(codes: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return codes.flatten().index_copy(0, index.long(), values.to(codes.dtype)).view_as(codes)
