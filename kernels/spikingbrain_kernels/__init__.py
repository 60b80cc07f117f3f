"""Ops of spiking, linear-attention models: one semantics `[B, T, H, K]`, several backends, states as arguments."""

from .backends import BACKENDS, OPS, Backend, BackendError, backends, state_dtype
from .ops import (
    gated_delta,
    gated_delta_step_,
    gated_linear,
    gated_linear_step_,
    lif_scan,
    lif_scan_step_,
    short_conv,
    short_conv_step_,
    window_attention,
    window_attention_step_,
    wkv,
    wkv_step_,
)
from .slots import Carrier, Slots, make_slots

__all__ = [
    "BACKENDS",
    "OPS",
    "Backend",
    "BackendError",
    "Carrier",
    "Slots",
    "backends",
    "gated_delta",
    "gated_delta_step_",
    "gated_linear",
    "gated_linear_step_",
    "lif_scan",
    "lif_scan_step_",
    "make_slots",
    "short_conv",
    "short_conv_step_",
    "state_dtype",
    "window_attention",
    "window_attention_step_",
    "wkv",
    "wkv_step_",
]
