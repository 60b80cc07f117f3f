"""Chunk kernels of flash-linear-attention, with gradients; heads that share keys and values are repeated for them."""

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import documents, gather, scatter


def gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Their `chunk_gla`."""
    from fla.ops.gla import chunk_gla

    decay = log_decay.expand(k.shape)
    return _run(chunk_gla, (q, k, v, decay), scale, state, cu_seqlens, mask)


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Their `chunk_gated_delta_rule`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return chunk_gated_delta_rule(q, k, v, decay[..., 0], beta[..., 0], **options)

    return _run(run, (q, k, v, log_decay, beta), scale, state, cu_seqlens, mask)


def _run(
    chunks: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor, ...],
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`chunks` on all rows or, for ragged ones, on the tokens that exist, packed; all but q are repeated."""
    batch, length, heads = tensors[0].shape[:3]
    members = heads // state.shape[1]
    repeated = (tensors[0], *(x.repeat_interleave(members, 2) for x in tensors[1:]))
    options = {"scale": scale, "initial_state": state.repeat_interleave(members, 1), "output_final_state": True}
    if cu_seqlens is None and mask is None:
        out, state = chunks(*repeated, **options)
        return out, state[:, ::members]
    docs = documents(batch, length, cu_seqlens, mask, state.device)
    starts = torch.cat([docs.lengths.new_zeros(1), docs.lengths.cumsum(0)])
    packed = (gather(x.flatten(0, 1), docs.tokens)[None] for x in repeated)
    out, state = chunks(*packed, **options, cu_seqlens=starts)
    return scatter(out, docs.tokens[None], batch * length), state[:, ::members]
