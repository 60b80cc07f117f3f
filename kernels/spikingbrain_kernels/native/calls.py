"""What calls of the C functions share: tensors as the C sources read them, documents, the way through torch.compile."""

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import needs_gradients
from ..layout import documents, token_stride
from ..library import TYPES, address


class Tokens(ctypes.Structure):
    """`Tensor` in the C sources: data, type, elements from token to token."""

    _fields_ = [("data", c_void_p), ("type", c_int64), ("stride", c_int64)]


def tokens_of(x: Tensor) -> Tokens:
    """`x [B, T, ...]` as `by_token` gave it."""
    return Tokens(address(x), TYPES[x.dtype], token_stride(x))


def kernel(
    name: str, fake: Callable[..., Any], mutates: tuple[str, ...] = (), backward: Callable[..., Any] | None = None
) -> Callable[[Any], Callable[..., Any]]:
    """Make the function a custom op `name` under torch.compile, with `fake` in place of it while shapes are traced.

    In eager mode it is called directly: the dispatcher costs more than a decode step of one layer. With `backward` it
    is an op where gradients are needed too: `backward(gradient, *inputs)` gives one for each input, or None.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        op = custom_op(f"spikingbrain::{name}", function, mutates_args=mutates)
        op.register_fake(fake)
        if backward is not None:
            op.register_autograd(partial(_backward, backward), setup_context=_keep_inputs)

        @wraps(function)
        def run(*args: Any) -> Any:
            learns = backward is not None and needs_gradients(*args)
            return op(*args) if learns or torch.compiler.is_dynamo_compiling() else function(*args)

        return run

    return wrap


def as_wide_as_v(q: Tensor, *others: Any) -> Tensor:
    """In place of what an op of q, k, v and more gives: `[B, T, H, V]`."""
    return q.new_empty(*q.shape[:3], others[1].shape[3])


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _backward(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # Once only: activation checkpointing lets what was saved be taken out a single time.
    tensors = iter(ctx.saved_tensors)
    return backward(gradient, *(next(tensors) if x is None else x for x in ctx.others))


@lru_cache(maxsize=64)
def _even_starts(rows: int, length: int) -> Tensor:
    # Kept for later calls, which may save it for a backward pass: it must not be made as an inference tensor.
    with torch.inference_mode(False):
        return torch.arange(rows + 1) * length


def starts_of(q: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The documents' tokens (None: all, in order) and where each begins among them."""
    if cu_seqlens is None and mask is None:
        rows, length = q.shape[:2]
        return None, torch.arange(rows + 1) * length if torch.compiler.is_compiling() else _even_starts(rows, length)
    docs = documents(q.shape[0], q.shape[1], cu_seqlens, mask, q.device)
    return docs.tokens, torch.cat([docs.lengths.new_zeros(1), docs.lengths.cumsum(0)])


def for_tokens(x: Tensor, width: int, tokens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[..., width]` to be written for the tokens of documents; zeros where there may be others."""
    new = x.new_empty if tokens is None else x.new_zeros
    return new((*x.shape[:-1], width), dtype=dtype)
