"""Weights of few bits for projections of spikes, and integer arithmetic to train them with: `spiking.weights`.

`ternary`: three values a row, the gradient straight through. `wage` (ICLR 2018, arXiv 1802.04680): with
Q_b(x) = clip(round(2^(b-1) x) / 2^(b-1), -1 + 2^(1-b), 1 - 2^(1-b)) and shift(x) = 2^round(log2 x), the product's
weights are W = a Q_2(w / a), its errors e become s Q_8(e / s) with s = shift(max|e|), and so do its weights' gradients.
Activations are spike counts, integers already. Differences from the paper: a = shift(4 mean|w|), so that weights of any
size have a third value, instead of weights of unit size; the optimizer keeps its fp32 weights and moments, so gradients
are rounded to the nearest and not at random.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear

WEIGHT_BITS, ERROR_BITS = 2, 8


def ternary(weight: Tensor) -> Tensor:
    """`weight [out, in]` with values -a, 0 and a in each row: 0 below 0.7 mean|w|, a the mean of the others.

    Ternary weight networks (arXiv 1605.04711); HitNet (NeurIPS 2018) thresholds its weights likewise. What is ternary
    already stays as it is.
    """
    magnitude = weight.abs()
    kept = magnitude > 0.7 * magnitude.mean(1, keepdim=True)
    amplitude = (magnitude * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return weight.sign() * kept * amplitude


def wage(weight: Tensor) -> Tensor:
    """a Q_2(w / a) of `weight [out, in]`: -a / 2, 0 or a / 2, a power of two."""
    return rounded(weight, shift(4 * weight.abs().mean()), WEIGHT_BITS)


def shift(x: Tensor) -> Tensor:
    """The power of two nearest to `x` in its logarithm; x > 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log2().round().exp2()


def rounded(x: Tensor, unit: Tensor, bits: int) -> Tensor:
    """unit Q_bits(x / unit): integers below 2^(bits - 1) times a step."""
    levels = 2 ** (bits - 1)
    return (x / unit * levels).round().clamp(1 - levels, levels - 1) * (unit / levels)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _ternary_product(counts: Tensor, weight: Tensor) -> Tensor:
    return linear(counts, weight + (ternary(weight) - weight).detach())


class _WageProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, counts: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        integer = wage(weight)
        ctx.save_for_backward(counts, integer)
        return linear(counts, integer)

    @staticmethod
    def backward(ctx: FunctionCtx, error: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        counts, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        error = error.to(weight.dtype)
        error = rounded(error, shift(error.abs().max()), ERROR_BITS)
        gradient = error.flatten(0, -2).T @ counts.flatten(0, -2).to(weight.dtype)
        return error @ weight, rounded(gradient, shift(gradient.abs().max()), ERROR_BITS)


# By the name in the config: what stands for the weights, and counts [..., in] times it.
WEIGHTS: dict[str, Any] = {
    "float": (_as_it_is, linear),
    "ternary": (ternary, _ternary_product),
    "wage": (wage, _WageProduct.apply),
}
