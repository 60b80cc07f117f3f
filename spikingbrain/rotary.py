"""Rotary positions (arXiv 2104.09864) as transformers computes them, with its scalings (linear, yarn, llama3, ...)."""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config import SpikingBrainConfig


class Rotary:
    """Rotates the two halves of each head by angles that grow with the position; fp32 (fp64 for fp64 inputs)."""

    def __init__(self, config: SpikingBrainConfig):
        self.config = config

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Angles a position `[head_dim / 2]` and the factor on the result."""
        rope = self.config.rope_parameters
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, device)
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device) / self.config.head_dim
        return 1.0 / rope["rope_theta"] ** half, 1.0

    def __call__(self, positions: Tensor, *inputs: Tensor) -> list[Tensor]:
        """Rotate each of `inputs [B, T, H, D]` to its `positions [B, T]`."""
        frequencies, factor = self._frequencies(positions.device)
        angles = (positions[..., None].float() * frequencies)[:, :, None]
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return [_rotate(x, cos.to(x.dtype), sin.to(x.dtype)) for x in inputs]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
