"""The norms before a block and before the head: `norm` in the config."""

from collections.abc import Callable

from torch import nn

from .config import SpikingBrainConfig
from .errors import InputError

NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms_norm": lambda width, eps: nn.RMSNorm(width, eps=eps),
    "simple_rms_norm": lambda width, eps: nn.RMSNorm(width, eps=eps, elementwise_affine=False),
    "layer_norm": lambda width, eps: nn.LayerNorm(width, eps=eps),
}


def make_norm(config: SpikingBrainConfig) -> nn.Module:
    """A norm over the hidden width; raises `InputError` naming the choices."""
    if config.norm not in NORMS:
        raise InputError(f"unknown norm {config.norm!r}; choose from {', '.join(NORMS)}")
    return NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
