"""Rotary positions (arXiv 2104.09864) as transformers computes them, with its scalings (linear, yarn, llama3, ...)."""

from functools import lru_cache

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spikingbrain_kernels import rotary

from .config import SpikingBrainConfig


class Rotary:
    """Rotates the two halves of each head by angles that grow with the position; fp32 (fp64 for fp64 inputs)."""

    def __init__(self, config: SpikingBrainConfig):
        self.config = config
        self.rope = dict(config.rope_parameters)
        self.head_dim = config.head_dim

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Angles a position `[head_dim / 2]` and the factor on the result."""
        rope = self.rope
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, device)
        return _default_frequencies(self.head_dim, rope["rope_theta"], device), 1.0

    def __call__(self, positions: Tensor, *inputs: Tensor) -> list[Tensor]:
        """Rotate each of `inputs [B, T, H, D]` to its `positions [B, T]`."""
        frequencies, factor = self._frequencies(positions.device)
        return [rotary(x, positions, frequencies, factor) for x in inputs]


@lru_cache(maxsize=16)
def _default_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    # Kept for later calls, which may save it for a backward pass: it must not be made as an inference tensor.
    with torch.inference_mode(False):
        half = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return 1.0 / theta**half
