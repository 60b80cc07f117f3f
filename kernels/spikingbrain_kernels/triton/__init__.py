"""Triton kernels for GPUs: forward passes, states updated where they lie in a pool, nothing compiled before it is used.

A decode step (rows of one length, no mask) reads nothing back from the device and allocates by the shapes of its
arguments alone, so that CUDA graphs can capture it. A tile multiplies masked weights of zero with what it loaded: a NaN
in a token may reach the tokens that share its tile.
"""

from .attention import window_attention
from .elementwise import encode_adaptive, encode_dead_zone, log_sigmoid, rms_norm, rms_norm_encode, rotary, swiglu
from .linear import linear, spike_linear
from .recurrent import gated_delta, gated_linear, lif_scan, short_conv, wkv

__all__ = [
    "encode_adaptive",
    "encode_dead_zone",
    "gated_delta",
    "gated_linear",
    "lif_scan",
    "linear",
    "log_sigmoid",
    "rms_norm",
    "rms_norm_encode",
    "rotary",
    "short_conv",
    "spike_linear",
    "swiglu",
    "window_attention",
    "wkv",
]
