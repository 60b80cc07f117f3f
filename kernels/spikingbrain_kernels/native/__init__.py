"""The C++ kernels as ops: fp32 and bf16 on the CPU, states updated in place where they lie in a pool.

Recurrences go token by token whatever the length, so a prompt cut into any chunks gives the same bits.
"""

from .attention import window_attention
from .channels import lif_scan, short_conv, wkv
from .elementwise import encode_adaptive, encode_dead_zone, log_sigmoid, rms_norm, rms_norm_encode, rotary, swiglu
from .products import linear, spike_linear
from .recurrent import gated_delta, gated_linear

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
