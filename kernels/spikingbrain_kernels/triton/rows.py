"""Which tokens a program works on: documents in rows of one length, in masked rows or in a packed row."""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import documents

# Whether the compiler may round a product and a sum together; Triton's own default changes with its versions.
FUSED, UNFUSED = {"enable_fp_fusion": True}, {"enable_fp_fusion": False}

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(op: Callable[P, R]) -> Callable[P, R]:
    """Launch kernels on the GPU that the first argument lies on, whichever is current."""

    @wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device  # type: ignore[attr-defined]
        if device.type != "cuda":
            return op(*args, **kwargs)
        with torch.cuda.device(device):
            return op(*args, **kwargs)

    return run


class Rows(NamedTuple):
    """`starts [D + 1]`: where each document begins among `tokens [N]`, the flat positions of the tokens that exist.

    Both are None where every one of `num_documents` rows is a document of `length` tokens.
    """

    num_documents: int
    length: int
    tokens: Tensor | None = None
    starts: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return self.num_documents * self.length if self.tokens is None else len(self.tokens)


class Blocks(NamedTuple):
    """Documents cut into blocks of tokens: `document [M]` (the number of documents for a block that is not used) and
    `offset [M]`, the block's first token, counted in its document; `first [D + 1]`: each document's first block.
    """

    document: Tensor
    offset: Tensor
    first: Tensor


def rows(x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Rows:
    """The documents of x `[B, T, ...]`."""
    batch, length = x.shape[:2]
    if cu_seqlens is None and mask is None:
        return Rows(batch, length)
    docs = documents(batch, length, cu_seqlens, mask, x.device)
    starts = torch.cat([docs.lengths.new_zeros(1), docs.lengths.cumsum(0)])
    return Rows(len(docs.lengths), length, docs.tokens, starts)


def blocks(docs: Rows, size: int, device: torch.device) -> Blocks:
    """Blocks of `size` tokens, document after document; as many as the shapes allow, without asking the device."""
    if docs.starts is None:
        counts = torch.full((docs.num_documents,), triton.cdiv(docs.length, size), device=device)
        most = docs.num_documents * triton.cdiv(docs.length, size)
    else:
        counts = (docs.starts.diff() + size - 1) // size
        most = min(docs.num_tokens, docs.num_tokens // size + docs.num_documents)
    ends = counts.cumsum(0)
    first = torch.cat([ends.new_zeros(1), ends])
    index = torch.arange(most, device=device)
    document = torch.searchsorted(ends, index, right=True)
    return Blocks(document, (index - first[document]) * size, first)


def empty_output(like: Tensor, docs: Rows, *shape: int) -> Tensor:
    """Memory for `[B, T, *shape]`; zero where tokens may be masked."""
    new = like.new_empty if docs.tokens is None else like.new_zeros
    return new(*like.shape[:2], *shape)


@triton.jit
def span(document, starts, length):
    """The first token of a document and the number of its tokens."""
    if starts is not None:
        start = tl.load(starts + document)
        count = tl.load(starts + document + 1) - start
    else:
        start = document * length
        count = length
    return start, count


@triton.jit
def block_span(block, starts, block_document, block_offset, length, num_documents):
    """A block's first token and how many of its document there are from it on: none for a block that is not used."""
    document = tl.load(block_document + block)
    used = document < num_documents
    start, count = span(tl.where(used, document, 0), starts, length)
    offset = tl.load(block_offset + block)
    return start + offset, tl.where(used, count - offset, 0)


@triton.jit
def flat(place, tokens, valid):
    """Flat positions of the tokens at `place`."""
    if tokens is not None:
        place = tl.load(tokens + place, mask=valid, other=0)
    return place


@triton.jit
def slot_of(document, slots):
    """The row of the pool that holds a document's state, -1 for none."""
    if slots is not None:
        document = tl.load(slots + document).to(tl.int64)
    return document


@triton.jit
def within(limit, flag):
    """`limit`, or 0 where the scalar `flag` is false: what an index is compared with.

    Triton's interpreter gives masks that were combined with a scalar a type that no load takes.
    """
    return tl.where(flag, limit, 0)
