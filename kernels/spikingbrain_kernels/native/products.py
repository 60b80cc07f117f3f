"""Products with packed weights."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from ..library import TYPES, address, library
from ..packed import KINDS, CPacked, Packed, panel_of
from .calls import kernel

# A row goes alone while the weights its spikes touch, summed over the rows, are fewer than this many whole matrices.
BREAK_EVEN_ROWS = 1.5


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x W^T + b, in x's type."""
    return _apply(x, packed, None, bias, False)


def spike_linear(counts: Tensor, scale: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """scale * (counts W^T) + b, in the type of `counts` (fp32 where they are integers)."""
    return _apply(counts, packed, scale, bias, True)


def _apply(x: Tensor, packed: Packed, scale: Tensor | None, bias: Tensor | None, counts: bool) -> Tensor:
    x = x.contiguous()
    if not torch.compiler.is_dynamo_compiling():
        return _multiply(x, packed.struct, scale, bias, counts, packed.out_features)
    kind = KINDS.index(packed.kind)
    return _linear(x, packed.weight, packed.scale, scale, bias, packed.out_features, kind, counts)


def _empty(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], others[4], dtype=torch.float32 if x.dtype == torch.int16 else x.dtype)


@kernel("linear", _empty)
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
    panel = panel_of(out_features, in_features, KINDS[kind])
    packed = CPacked(address(weight), address(group_scale), in_features, out_features, panel, kind)
    return _multiply(x, packed, token_scale, bias, counts, out_features)


def _multiply(
    x: Tensor, packed: CPacked, token_scale: Tensor | None, bias: Tensor | None, counts: bool, out_features: int
) -> Tensor:
    shape, dtype = (*x.shape[:-1], out_features), x.dtype
    out = x.new_empty(shape, dtype=torch.float32) if dtype == torch.int16 else x.new_empty(shape)
    library().linear(
        *(ctypes.byref(packed), address(x), TYPES[dtype], address(token_scale), address(bias)),
        *(address(out), TYPES[out.dtype], math.prod(shape[:-1]), counts, BREAK_EVEN_ROWS, torch.get_num_threads()),
    )
    return out
