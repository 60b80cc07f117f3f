"""Ops of spiking, linear-attention models: one semantics `[B, T, H, K]`, several backends, states as arguments."""

from .backends import BACKENDS, OPS, RECURRENT_OPS, Backend, BackendError, backends, state_dtype
from .ops import (
    gated_linear,
    gated_linear_step_,
    linear,
    spike_linear,
    window_attention,
    window_attention_step_,
)
from .packed import Packed, pack, pack_codes
from .slots import Slots, make_slots

__all__ = [
    "BACKENDS",
    "OPS",
    "RECURRENT_OPS",
    "Backend",
    "BackendError",
    "Packed",
    "Slots",
    "backends",
    "gated_linear",
    "gated_linear_step_",
    "linear",
    "make_slots",
    "pack",
    "pack_codes",
    "spike_linear",
    "state_dtype",
    "window_attention",
    "window_attention_step_",
]
