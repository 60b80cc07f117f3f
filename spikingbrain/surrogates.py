"""Surrogate gradients: the derivative that stands in for that of the step function u >= 0.

Each is scaled as in the literature (STBP, arXiv 1706.02609; SpikingJelly's definitions), integrates to 1 and takes
`u`, the distance to the threshold.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .errors import InputError


def atan(u: Tensor) -> Tensor:
    """1 / (1 + (pi u)^2): the derivative of atan(pi u) / pi."""
    return 1 / (1 + (math.pi * u) ** 2)


def sigmoid(u: Tensor) -> Tensor:
    """4 s (1 - s) with s = sigmoid(4 u)."""
    s = torch.sigmoid(4 * u)
    return 4 * s * (1 - s)


def rectangle(u: Tensor) -> Tensor:
    """1 where |u| < 1/2, else 0."""
    return (u.abs() < 0.5).to(u.dtype)


def triangle(u: Tensor) -> Tensor:
    """max(0, 1 - |u|)."""
    return (1 - u.abs()).clamp(min=0)


SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "atan": atan,
    "sigmoid": sigmoid,
    "rectangle": rectangle,
    "triangle": triangle,
}


def surrogate(name: str) -> Callable[[Tensor], Tensor]:
    """A surrogate derivative by name; raises `InputError` naming the choices."""
    if name not in SURROGATES:
        raise InputError(f"unknown surrogate {name!r}; choose from {', '.join(SURROGATES)}")
    return SURROGATES[name]


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(u)
        ctx.derivative = derivative  # type: ignore[attr-defined]
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (u,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * ctx.derivative(u), None  # type: ignore[attr-defined]


def heaviside(u: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
    """1 where u >= 0, else 0; its gradient is `derivative(u)`."""
    return _Heaviside.apply(u, derivative)
