"""Ragged batches as documents: padded rows and packed streams become equal blocks of one document each.

A token that is masked out belongs to no document, so padding cannot change what is computed.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Documents(NamedTuple):
    """`tokens [N]`: flat positions (row * T + column) of the real tokens, document after document; `lengths [D]`."""

    tokens: Tensor
    lengths: Tensor

    @property
    def starts(self) -> Tensor:
        """`[D]`: where each document begins in `tokens`."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def at(self, place: Tensor) -> Tensor:
        """`tokens[place]`, for places that may lie outside (they give some token, to be masked by the caller)."""
        if not len(self.tokens):
            return torch.zeros_like(place)
        return self.tokens[place.clamp(0, len(self.tokens) - 1)]

    def first(self, positions: Tensor) -> Tensor:
        """`[D]`: the position of each document's first token; zero for an empty document."""
        if not len(self.tokens):
            return torch.zeros_like(self.lengths)
        return positions.flatten()[self.at(self.starts)].masked_fill(self.lengths == 0, 0)


class Blocks(NamedTuple):
    """Documents cut into blocks of C tokens, all first blocks before all second ones, longest documents first.

    `tokens [M, C]`: flat token position, or -1 past a document's end. `document [M]`; `offset [M]`: the block's first
    token, counted in its document. `active`: how many documents have a j-th block. `order [D]`: longest first.
    """

    tokens: Tensor
    document: Tensor
    offset: Tensor
    active: list[int]
    order: Tensor


def documents(
    batch: int, length: int, cu_seqlens: Tensor | None, mask: Tensor | None, device: torch.device
) -> Documents:
    """The documents of a batch `[B, T]`: its rows, without masked tokens, or the pieces named by `cu_seqlens`.

    Raises ValueError where `cu_seqlens` does not cover a batch of one row or is combined with a mask.
    """
    if cu_seqlens is not None:
        _check_packed(batch, length, cu_seqlens, mask)
        return Documents(torch.arange(length, device=device), cu_seqlens.diff().long())
    if mask is not None:
        return Documents(mask.flatten().nonzero().squeeze(1), mask.sum(1).long())
    return Documents(torch.arange(batch * length, device=device), torch.full((batch,), length, device=device))


def _check_packed(batch: int, length: int, cu_seqlens: Tensor, mask: Tensor | None) -> None:
    if batch != 1 or mask is not None:
        raise ValueError(f"cu_seqlens packs documents into one row without a mask; got {batch} rows")
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to the {length} tokens of the row, got {cu_seqlens.tolist()}")


def blocks(docs: Documents, size: int) -> Blocks:
    """Cut documents into blocks of `size` tokens."""
    counts = (docs.lengths + size - 1) // size
    order = counts.argsort(descending=True, stable=True)
    sorted_counts = counts[order]
    steps = int(sorted_counts[0]) if len(counts) else 0
    active = [int((sorted_counts > step).sum()) for step in range(steps)]
    document = torch.cat([order[:n] for n in active]) if active else order[:0]
    step = torch.repeat_interleave(torch.arange(steps), torch.tensor(active, dtype=torch.long)).to(order.device)
    offset = step * size
    within = offset[:, None] + torch.arange(size, device=order.device)
    tokens = docs.at(docs.starts[document][:, None] + within)
    tokens = tokens.masked_fill(within >= docs.lengths[document][:, None], -1)
    return Blocks(tokens, document, offset, active, order)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x [N, ...]` at `index [...]`; -1 gives zeros."""
    padded = pad(x, (0, 0) * (x.dim() - 1) + (0, 1))
    return padded.index_select(0, index.flatten() % len(padded)).unflatten(0, index.shape)


def scatter(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """The inverse of `gather`: `rows [M, C, ...]` back to `[count, ...]`; tokens named nowhere are zero."""
    place = torch.full((count,), -1, device=index.device)
    used = (index >= 0).flatten().nonzero().squeeze(1)
    place[index.flatten()[used]] = used
    return gather(rows.flatten(0, 1), place)


def by_token(x: Tensor) -> Tensor:
    """x `[B, T, H, K]` with its heads contiguous and its tokens at equal distances."""
    if x.is_contiguous():
        return x
    by_row = x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.stride(1) * x.shape[1]
    heads = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if by_row and heads else x.contiguous()


def token_stride(x: Tensor) -> int:
    """Elements from token to token of what `by_token` gave."""
    strides = x.stride()
    return strides[0] if x.shape[1] == 1 else strides[1]
