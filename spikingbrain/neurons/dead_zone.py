"""Dead zone: theta says when a channel fires, V_th how finely it counts.

With m = mean|x| of the token and V_th = m / k: counts = round(x / V_th) where |x| >= theta m, else 0. A processor skips
a channel only where its whole count is 0, and at theta = 0 (SpikingBrain's `adaptive`) few are. Training-free
magnitude thresholds: TEAL (arXiv 2408.14690); gradients of a learned step size: LSQ (arXiv 1902.08153).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from spikingbrain_kernels import encode_dead_zone

from .. import surrogates
from ..errors import InputError
from . import Spikes, SpikingNeuron, widen
from .adaptive import MAX_THRESHOLD, MIN_THRESHOLD, mean_magnitude

LEAST_K = 0.5


class Neuron(SpikingNeuron):
    """`theta >= 0`, in units of the token's mean magnitude; `k > 0`: counts of a channel of mean magnitude.

    Both are where the tensors `theta [C]` and `k [1]` start; calibration and training set them. `surrogate`: the
    derivative of firing with respect to |x| / m - theta, in units of `width`.
    """

    def __init__(
        self, channels: int, *, theta: float = 0.5, k: float = 6.0, surrogate: str = "rectangle", width: float = 0.5
    ):
        super().__init__(channels)
        if not theta >= 0:
            raise InputError(f"dead_zone: theta must be at least 0, got {theta}")
        if not (k > 0 and width > 0):
            raise InputError(f"dead_zone: k and width must be above 0, got {k} and {width}")
        self.theta = nn.Parameter(torch.full((channels,), float(theta)))
        self.k = nn.Parameter(torch.full((1,), float(k)))
        self.derivative = _surrogate(surrogate, width)
        self.width = width

    def fire(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> counts `[..., C]`, scale `[..., 1]`."""
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, self.theta, self.k))):
            low, high = MIN_THRESHOLD, MAX_THRESHOLD
            return Spikes(*encode_dead_zone(x, self.theta, self.k, least_k=LEAST_K, low=low, high=high))
        wide = widen(x)
        mean = mean_magnitude(wide)
        scale = mean / self.k.clamp(min=LEAST_K).to(wide.dtype)
        margin = wide.detach().abs() / mean - self.theta.clamp(min=0).to(wide.dtype)
        return Spikes(_Count.apply(wide, scale, margin, self.derivative).to(x.dtype), scale)

    def silence(self, x: Tensor, counts: Tensor) -> Tensor:
        """The share of 0 in the `counts` of `x` (a scalar), differentiable in `theta` and, through |x|, in x.

        The step is smoothed over `width`; the forward value is exact.
        """
        wide = widen(x)
        margin = (wide.abs() / mean_magnitude(wide) - self.theta.clamp(min=0).to(wide.dtype)) / self.width
        soft = torch.sigmoid(-4 * margin).mean()
        exact = (counts.detach() == 0).float().mean()
        return soft + (exact - soft).detach()


def _surrogate(name: str, width: float) -> Any:
    derivative = surrogates.surrogate(name)
    return lambda margin: derivative(margin / width) / width


class _Count(torch.autograd.Function):
    """round(x / scale) where margin >= 0, else 0.

    Gradients: x straight through, as if the count were x / scale; scale as if it were too, where a channel fires (with
    what the count is multiplied by, that is LSQ's count - x / scale); margin by the surrogate times x / scale.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, margin: Tensor, derivative: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, scale, margin)
        ctx.derivative = derivative  # type: ignore[attr-defined]
        return (x / scale).round() * (margin >= 0)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, scale, margin = ctx.saved_tensors  # type: ignore[attr-defined]
        to_level = gradient * x / scale
        to_scale = -(to_level * (margin >= 0)).sum(-1, keepdim=True) / scale
        return gradient / scale, to_scale, to_level * ctx.derivative(margin), None  # type: ignore[attr-defined]
