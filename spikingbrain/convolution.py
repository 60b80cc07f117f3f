"""Short causal convolutions and the token shift: what mixers see of the tokens just before."""

import math

import torch
from torch import Tensor, nn

from spikingbrain_kernels import Slots, short_conv


class ShortConvolution(nn.Module):
    """Depthwise, causal, without bias; the state is the last `kernel_size - 1` inputs."""

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        bound = 1 / math.sqrt(kernel_size)
        self.weight = nn.Parameter(torch.empty(width, 1, kernel_size).uniform_(-bound, bound))

    def forward(
        self, x: Tensor, state: Tensor | Slots | None, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | Slots]:
        """`x [B, T, C]` -> the same and the new state."""
        return short_conv(x, self.weight.squeeze(1), state=state, cu_seqlens=cu_seqlens, mask=mask)


class TokenShift(nn.Module):
    """RWKV's token shift: x_t * mu + x_{t-1} * (1 - mu), for each name a mu a channel `[1, 1, C]`."""

    def __init__(self, width: int, exponents: dict[str, float]):
        """`exponents`: mu of channel i starts as (i / C)^exponent."""
        super().__init__()
        self.names = tuple(exponents)
        channel = torch.arange(width) / width
        for name, exponent in exponents.items():
            setattr(self, f"time_mix_{name}", nn.Parameter((channel**exponent).view(1, 1, width)))

    def forward(
        self, x: Tensor, state: Tensor | Slots | None, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | Slots]:
        """`x [B, T, C]` -> the mixtures by name and the new state: the last token's x."""
        only_before = x.new_tensor([1.0, 0.0]).expand(x.shape[2], 2)
        before, state = short_conv(x, only_before, state=state, cu_seqlens=cu_seqlens, mask=mask)
        mu = {name: getattr(self, f"time_mix_{name}") for name in self.names}
        return {f"shifted_{name}": x * m + before * (1 - m) for name, m in mu.items()}, state
