"""Weights packed once for fast products: input-major panels of outputs, so that one channel's weights are one run."""

import ctypes
from ctypes import c_int64, c_void_p
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from .memory import zeros

KINDS = ("fp32", "bf16", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
GROUP = 128  # inputs that share a scale in int8
UNIT = 64  # outputs are padded to whole units
LARGEST_PANEL = 2560  # outputs
LEAST_GROUPS = 16  # for which threads share inputs instead of outputs
LARGEST_CODE = 127
# Of the additions in packed products: raised when they give other bits. 2: int8, too, adds up two halves of the inputs.
ORDER = 2


def panel_of(out_features: int, in_features: int, kind: str) -> int:
    """Outputs of a panel: as few and as even panels as fit, an even number, so that two threads have as many each.

    int8 with many inputs is in one panel, if it fits: there each of two threads has half of the inputs.
    """
    units = -(-out_features // UNIT)
    if kind == "int8" and units * UNIT <= LARGEST_PANEL and in_features > (LEAST_GROUPS - 1) * GROUP:
        return units * UNIT
    panels = 2 * -(-units * UNIT // (2 * LARGEST_PANEL))
    return -(-units // panels) * UNIT


class CPacked(ctypes.Structure):
    """`Packed` in the C sources."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scale")),
        *((name, c_int64) for name in ("in_features", "out_features", "panel", "kind")),
    ]


class Packed:
    """A weight `[out, in]` as `pack` made it.

    `weight`: panels `[in, panel]` one after another, flat; the last may be narrower. `scale [ceil(in / 128), padded
    out]` in fp32, int8 only.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, in_features: int, out_features: int):
        self.weight, self.scale = weight, scale
        self.in_features, self.out_features = in_features, out_features
        self.kind = KINDS[DTYPES.index(weight.dtype)]
        self.panel = panel_of(out_features, in_features, self.kind)

    @cached_property
    def struct(self) -> CPacked:
        """What the C functions take; it points into this object's tensors."""
        scale = None if self.scale is None else self.scale.data_ptr()
        kind = KINDS.index(self.kind)
        return CPacked(self.weight.data_ptr(), scale, self.in_features, self.out_features, self.panel, kind)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The weight `[out, in]` as stored and, for int8, its scales `[out, ceil(in / 128)]`."""
        panels = self.weight.split(self.panel * self.in_features)
        weight = torch.cat([panel.view(self.in_features, -1).T for panel in panels])[: self.out_features]
        return weight, None if self.scale is None else self.scale.T[: self.out_features]


def pack(weight: Tensor, kind: str) -> Packed:
    """Pack `weight [out, in]` as `fp32`, `bf16` or `int8` (rounded to 127 steps of the largest in each group of 128).

    Raises ValueError for an unknown kind or for weights that are not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weights to be packed must be finite")
    if kind != "int8":
        return _panels(weight.detach().to(DTYPES[KINDS.index(kind)]), None)
    groups = pad(weight.detach().float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1) / LARGEST_CODE
    codes = (groups / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().flatten(1)
    return pack_codes(codes[:, : weight.shape[1]].to(torch.int8), scale)


def pack_codes(codes: Tensor, scale: Tensor) -> Packed:
    """Pack int8 `codes [out, in]` with fp32 `scale [out, ceil(in / 128)]`; raises ValueError where they do not fit."""
    groups = -(-codes.shape[1] // GROUP)
    if codes.dtype != torch.int8 or tuple(scale.shape) != (codes.shape[0], groups):
        raise ValueError(f"codes {codes.dtype} {tuple(codes.shape)} need scales {(codes.shape[0], groups)}")
    return _panels(codes, pad(scale.float(), (0, 0, 0, -codes.shape[0] % UNIT)).T.contiguous())


def _panels(weight: Tensor, scale: Tensor | None) -> Packed:
    out_features, in_features = weight.shape
    padded = out_features + -out_features % UNIT
    flat = zeros([padded * in_features], weight.dtype, weight.device)
    width = panel_of(out_features, in_features, KINDS[DTYPES.index(weight.dtype)])
    for start in range(0, out_features, width):
        panel = flat[start * in_features : min(start + width, padded) * in_features].view(in_features, -1)
        rows = weight[start : start + width]
        panel[:, : len(rows)] = rows.T
    return Packed(flat, scale, in_features, out_features)
