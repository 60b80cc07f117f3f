"""Ops of spiking, linear-attention models: one semantics `[B, T, H, K]`, several backends, states as arguments."""

from .backends import BACKENDS, OPS, RECURRENT_OPS, Backend, BackendError, backends, state_dtype
from .ops import (
    encode_adaptive,
    gated_linear,
    gated_linear_step_,
    linear,
    log_sigmoid,
    rms_norm,
    rotary,
    spike_linear,
    swiglu,
    window_attention,
    window_attention_step_,
)
from .packed import KINDS, Packed, pack, pack_codes
from .slots import Slots, make_slots

__all__ = [
    "BACKENDS",
    "KINDS",
    "OPS",
    "RECURRENT_OPS",
    "Backend",
    "BackendError",
    "Packed",
    "Slots",
    "backends",
    "encode_adaptive",
    "gated_linear",
    "gated_linear_step_",
    "linear",
    "log_sigmoid",
    "make_slots",
    "pack",
    "pack_codes",
    "rms_norm",
    "rotary",
    "spike_linear",
    "swiglu",
    "state_dtype",
    "window_attention",
    "window_attention_step_",
]
