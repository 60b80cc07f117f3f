"""Products with packed weights: floats, and spike counts with int8 weights in exact integers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed import GROUP, Packed
from .rows import UNFUSED, on_its_device

OUT_BLOCK = 64  # divides the packed form's units, so that a tile lies in one panel
ROW_BLOCKS = (16, 64)


@on_its_device
def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x W^T + b, sums in fp32, in x's type; groups of int8 weights are scaled one by one."""
    return _multiply(x, None, packed, bias, x.dtype)


@on_its_device
def spike_linear(counts: Tensor, scale: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """scale * (counts W^T) + b: with int8 weights integer sums over groups, scaled and added over each half of them.

    Counts of at most 127 are one int8 product a tile; larger ones, up to 16 bits, are cut into three parts of 7 bits.
    """
    dtype = counts.dtype if counts.is_floating_point() else torch.float32
    return _multiply(counts, scale.float().contiguous(), packed, bias, dtype)


def _multiply(x: Tensor, scale: Tensor | None, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(*x.shape[:-1], packed.out_features, dtype=dtype)
    rows = out.numel() // max(1, packed.out_features)
    if not out.numel():
        return out
    tile = next((size for size in ROW_BLOCKS if rows <= size), ROW_BLOCKS[-1])
    kernel = _spike_kernel if scale is not None and packed.kind == "int8" else _float_kernel
    padded = packed.out_features + -packed.out_features % OUT_BLOCK
    kernel[(triton.cdiv(rows, tile), padded // OUT_BLOCK)](
        *(x.contiguous(), scale, packed.weight, packed.scale, bias, out),
        *(rows, packed.in_features, packed.out_features, padded),
        ROW_BLOCK=tile,
        OUT_BLOCK=OUT_BLOCK,
        GROUP=GROUP,
        PANEL=packed.panel,
        # Sums are added as the reference adds them.
        **UNFUSED,
    )
    return out


@triton.jit
def _panel(weight, column, in_features, padded, PANEL: tl.constexpr):
    """Where the weights of these outputs begin, and the elements from one input's weights to the next one's."""
    panel = column // PANEL
    width = tl.minimum(PANEL, padded - panel * PANEL)
    return weight + panel.to(tl.int64) * PANEL * in_features + column % PANEL, width


@triton.jit
def _finish(total, scale, bias, out, row, column, rows, out_features):
    exists = (row < rows)[:, None] & (column < out_features)[None, :]
    if scale is not None:
        total = total * tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    if bias is not None:
        total = total + tl.load(bias + column, mask=column < out_features, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * out_features + column[None, :], total, mask=exists)


@triton.jit
def _float_kernel(
    x,
    scale,
    weight,
    group_scale,
    bias,
    out,
    rows,
    in_features,
    out_features,
    padded,
    ROW_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PANEL: tl.constexpr,
):
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    panel, width = _panel(weight, column, in_features, padded, PANEL)
    total = tl.zeros([ROW_BLOCK, OUT_BLOCK], tl.float32)
    for group in range(tl.cdiv(in_features, GROUP)):
        index = group * GROUP + tl.arange(0, GROUP)
        real = index < in_features
        place = x + row.to(tl.int64)[:, None] * in_features + index[None, :]
        values = tl.load(place, mask=(row < rows)[:, None] & real[None, :], other=0)
        weights = tl.load(panel[None, :] + index[:, None] * width[None, :], mask=real[:, None], other=0)
        # Codes of 8 bits and bf16 weights are exact in bf16; everything else is multiplied in fp32.
        if (values.dtype != tl.bfloat16) or (weights.dtype == tl.float32):
            values, weights = values.to(tl.float32), weights.to(tl.float32)
        else:
            weights = weights.to(tl.float32).to(tl.bfloat16)
        part = tl.dot(values, weights, input_precision="tf32x3")
        if group_scale is not None:
            part = part * tl.load(group_scale + group * padded + column)[None, :]
        total = total + part
    _finish(total, scale, bias, out, row, column, rows, out_features)


@triton.jit
def _spike_kernel(
    counts,
    scale,
    weight,
    group_scale,
    bias,
    out,
    rows,
    in_features,
    out_features,
    padded,
    ROW_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PANEL: tl.constexpr,
):
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    panel, width = _panel(weight, column, in_features, padded, PANEL)
    total = tl.zeros([ROW_BLOCK, OUT_BLOCK], tl.float32)
    first = total
    groups = tl.cdiv(in_features, GROUP)
    for group in range(groups):
        # One sum over each half of the groups.
        second = group == (groups + 1) // 2
        first = tl.where(second, total, first)
        total = tl.where(second, 0.0, total)
        index = group * GROUP + tl.arange(0, GROUP)
        real = index < in_features
        place = counts + row.to(tl.int64)[:, None] * in_features + index[None, :]
        values = tl.load(place, mask=(row < rows)[:, None] & real[None, :], other=0).to(tl.float32)
        weights = tl.load(panel[None, :] + index[:, None] * width[None, :], mask=real[:, None], other=0)
        whole = (tl.abs(values) <= 32767) & (values == tl.floor(values))
        numbers = tl.where(whole, values, 0.0).to(tl.int32)
        if tl.max(tl.abs(numbers)) <= 127:
            sums = tl.dot(numbers.to(tl.int8), weights, out_dtype=tl.int32)
        else:
            sums = tl.dot((numbers & 127).to(tl.int8), weights, out_dtype=tl.int32)
            sums += tl.dot(((numbers >> 7) & 127).to(tl.int8), weights, out_dtype=tl.int32) * 128
            sums += tl.dot((numbers >> 14).to(tl.int8), weights, out_dtype=tl.int32) * 16384
        part = sums.to(tl.float32)
        # Each row is judged alone, so that its result does not depend on the rows beside it.
        exact = tl.min(whole.to(tl.int32), 1)
        if tl.min(exact) == 0:
            floats = tl.dot(values, weights.to(tl.float32), input_precision="tf32x3")
            part = tl.where((exact == 1)[:, None], part, floats)
        total = total + part * tl.load(group_scale + group * padded + column)[None, :]
    _finish(first + total, scale, bias, out, row, column, rows, out_features)
