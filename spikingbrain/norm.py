"""The norms before a block and before the head: `norm` in the config."""

from collections.abc import Callable
from typing import Any

from torch import nn

from . import registry
from .config import SpikingBrainConfig
from .errors import InputError

NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms_norm": lambda width, eps: nn.RMSNorm(width, eps=eps),
    "simple_rms_norm": lambda width, eps: nn.RMSNorm(width, eps=eps, elementwise_affine=False),
    "layer_norm": lambda width, eps: nn.LayerNorm(width, eps=eps),
}


def make_norm(config: SpikingBrainConfig, start: float | None = None) -> nn.Module:
    """A norm over the hidden width; raises `InputError` naming the choices. `start`: of its weight, instead of 1."""
    if config.norm not in NORMS:
        raise InputError(f"unknown norm {config.norm!r}; choose from {', '.join(NORMS)}")
    norm: Any = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
    norm.start = start
    return norm


def threshold_gain(config: SpikingBrainConfig) -> float | None:
    """Where norms before neurons start (tdBN, AAAI 2021, arXiv 2011.05280): alpha V_th, alpha being `spiking.gain`."""
    spiking = config.spiking
    if spiking is None or spiking["gain"] is None:
        return None
    return spiking["gain"] * registry.load("neurons", spiking["neuron"]).Neuron(1, **spiking["params"]).v_th
