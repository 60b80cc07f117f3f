"""Neurons whose time is the sequence: a membrane for each channel, passed on from token to token."""

from collections.abc import Callable

import torch
from torch import Tensor

from spikingbrain_kernels import Slots, state_dtype
from spikingbrain_kernels.layout import blocks, documents, gather, scatter

# (input [D, C], membrane [D, C]) -> (counts, membrane after the reset), for one token of D documents.
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def over_tokens(
    step: Step,
    x: Tensor,
    membrane: Tensor | Slots | None,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | Slots]:
    """Run `step` token after token over `x [B, T, C]`; all documents advance together.

    Returns the counts `[B, T, C]` and the membranes `[B or D, C]` after the last tokens (given slots: the same slots,
    updated). A masked token changes no membrane and fires nothing.
    """
    docs = documents(x.shape[0], x.shape[1], cu_seqlens, mask, x.device)
    layout = blocks(docs, 1)
    inputs = gather(x.flatten(0, 1).to(state_dtype(x.dtype)), layout.tokens[:, 0])
    rows = membrane.read() if isinstance(membrane, Slots) else membrane
    rows = inputs.new_zeros(len(docs.lengths), x.shape[2]) if rows is None else rows
    current, ended, fired, start = rows[layout.order], [], [], 0
    for active in layout.active:
        ended.append(current[active:])
        counts, current = step(inputs[start : start + active], current[:active])
        fired.append(counts)
        start += active
    last = torch.cat([current, *reversed(ended)])[layout.order.argsort()]
    counts = torch.cat(fired) if fired else inputs
    if isinstance(membrane, Slots):
        membrane.write_(last)
    after = membrane if isinstance(membrane, Slots) else last
    return scatter(counts[:, None], layout.tokens, x.shape[0] * x.shape[1]).view(x.shape).to(x.dtype), after
