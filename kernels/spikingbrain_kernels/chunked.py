"""The same ops in parallel torch: for training and prefill on any device, differentiable, cost linear in T."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from .backends import state_dtype
from .layout import Blocks, Documents, blocks, documents, gather, scatter

CHUNK = 64
SUB_CHUNK = 16
# Few queries a block waste few products on keys outside their band; fewer still copy too many keys.
MAX_QUERY_BLOCK = 128


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
    """Chunk-parallel gated linear attention (GLA, arXiv 2312.06635, section 4); every exponent is <= 0."""
    batch, length = q.shape[:2]
    docs = documents(batch, length, cu_seqlens, mask, q.device)
    layout = blocks(docs, _chunk_size(docs.longest))
    q, k, v, log_decay = (gather(x.flatten(0, 1).to(state.dtype), layout.tokens) for x in (q, k, v, log_decay))
    q = (q * scale).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [M, H_kv, G, C, K]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [M, H_kv, C, K]
    total = log_decay.transpose(1, 2).expand(k.shape).cumsum(2)
    updates = (k * (total[:, :, -1:] - total).exp()).transpose(-1, -2) @ v
    keep = total[:, :, -1].exp()[..., None]
    inputs, state = _scan(layout, lambda here, memory: keep[here] * memory + updates[here], state)
    out = _within(q, k, v, total) + (q * total.exp()[:, :, None]) @ inputs[:, :, None]
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [M, C, H, V]
    return scatter(out, layout.tokens, batch * length), state


def _chunk_size(longest: int) -> int:
    """One token for decoding, else whole sub-chunks, as few as the longest document needs."""
    return max(1, longest) if longest < SUB_CHUNK else min(CHUNK, -(-longest // SUB_CHUNK) * SUB_CHUNK)


def _scan(layout: Blocks, advance: Callable[[slice, Tensor], Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Pass the state from block to block; gives the state before each block `[M, ...]` and after each document.

    `advance(here, states)`: the states after the blocks `here` for those before them.
    """
    current = state[layout.order]
    before, start = [state[:0]], 0
    for active in layout.active:
        here = slice(start, start + active)
        before.append(current[:active])
        current = torch.cat([advance(here, current[:active]), current[active:]])
        start += active
    return torch.cat(before), current[layout.order.argsort()]


def _within(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> Tensor:
    """What the tokens of a chunk give each other: near ones pair by pair, far ones through a point between them."""
    size = k.shape[2]
    width = min(SUB_CHUNK, size)
    causal = torch.ones(width, width, dtype=torch.bool, device=q.device).tril()
    parts = []
    for start in range(0, size, width):
        here = slice(start, start + width)
        gap = (total[:, :, here, None] - total[:, :, None, here]).masked_fill(~causal[..., None], -torch.inf)
        near = torch.einsum("mhgik,mhijk->mhgij", q[:, :, :, here], gap.exp() * k[:, :, None, here])
        part = near @ v[:, :, None, here]
        if start:
            middle = total[:, :, start - 1 : start]
            queries = q[:, :, :, here] * (total[:, :, here] - middle).exp()[:, :, None]
            keys = k[:, :, :start] * (middle - total[:, :, :start]).exp()
            part = part + queries @ keys.transpose(-1, -2)[:, :, None] @ v[:, :, None, :start]
        parts.append(part)
    return torch.cat(parts, dim=3)


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
    """Chunk-parallel gated delta rule (arXiv 2412.06464, section 3.3); every exponent is <= 0.

    What token i writes, u_i = beta_i (v_i - k_i S'), depends on what the tokens before it in the chunk wrote and,
    linearly, on the chunk's first state S: one triangular system gives U = new - seen S.
    """
    batch, length = q.shape[:2]
    docs = documents(batch, length, cu_seqlens, mask, q.device)
    layout = blocks(docs, _chunk_size(docs.longest))
    streams = (x.flatten(0, 1).to(state.dtype) for x in (q, k, v, beta, log_decay))
    q, k, v, beta, log_decay = (gather(x, layout.tokens) for x in streams)
    q = (q * scale).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [M, H_kv, G, C, K]
    k, v, beta, total = (x.transpose(1, 2) for x in (k, v, beta, log_decay.cumsum(1)))  # [M, H_kv, C, ...]
    later = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    decay = (total - total.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()  # [M, H_kv, C, C]
    system = beta * decay * (k @ k.transpose(-1, -2))
    sides = beta * torch.cat([v, total.exp() * k], dim=-1)
    solved = torch.linalg.solve_triangular(system.tril(-1), sides, upper=False, unitriangular=True)
    new, seen = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    keep, keys = total[:, :, -1:].exp(), (k * (total[:, :, -1:] - total).exp()).transpose(-1, -2)

    def advance(here: slice, memory: Tensor) -> Tensor:
        return keep[here] * memory + keys[here] @ (new[here] - seen[here] @ memory)

    inputs, state = _scan(layout, advance, state)
    near = q @ k.transpose(-1, -2)[:, :, None] * decay[:, :, None]
    out = near @ (new - seen @ inputs)[:, :, None] + (q * total.exp()[:, :, None]) @ inputs[:, :, None]
    return scatter(out.permute(0, 3, 1, 2, 4).flatten(2, 3), layout.tokens, batch * length), state


def wkv(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    *,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Blocks of RWKV-4: each token a softmax over its block's tokens and the state, channel by channel."""
    batch, length = k.shape[:2]
    docs = documents(batch, length, cu_seqlens, mask, k.device)
    layout = blocks(docs, max(1, min(SUB_CHUNK, docs.longest)))
    k, v = (gather(x.flatten(0, 1).to(state.dtype), layout.tokens) for x in (k, v))  # [M, C, D]
    w, u = -time_decay.to(state.dtype).exp(), time_first.to(state.dtype)
    index = torch.arange(k.shape[1], device=k.device)[:, None]
    real = (layout.tokens >= 0)[..., None]
    count = real.sum(1)
    # A token's weight at its block's end, relative to the block's largest; a block's steps are its real tokens.
    exponent = (k + (count[:, None] - 1 - index) * w).masked_fill(~real, -torch.inf)
    top = exponent.amax(1).detach()
    weight = (exponent - top[:, None]).exp()
    block = torch.stack([(weight * v).sum(1), weight.sum(1)], dim=1)

    def advance(here: slice, memory: Tensor) -> Tensor:
        old = (memory[:, 2] + count[here] * w).masked_fill(memory[:, 1] == 0, -torch.inf)
        largest = torch.maximum(old, top[here]).detach()
        sums = (old - largest).exp()[:, None] * memory[:, :2] + (top[here] - largest).exp()[:, None] * block[here]
        return torch.cat([sums, largest[:, None]], dim=1)

    inputs, state = _scan(layout, advance, state)
    numerator, denominator, top = inputs.unbind(1)
    empty = denominator == 0
    denominator = denominator.masked_fill(empty, 1)
    carried = (top + denominator.log()).masked_fill(empty, -torch.inf)[:, None] + index * w  # [M, C, D]
    lag = index - 1 - index.T
    offset = torch.where((lag == -1)[..., None], u, lag[..., None] * w).masked_fill((lag < -1)[..., None], -torch.inf)
    weights = torch.cat([carried[:, :, None], k[:, None] + offset], dim=2).softmax(2)  # [M, C, 1 + C, D]
    out = weights[:, :, 0] * (numerator / denominator)[:, None] + (weights[:, :, 1:] * v[:, None]).sum(2)
    return scatter(out, layout.tokens, batch * length), state


def lif_scan(
    x: Tensor,
    *,
    tau: float,
    v_th: float,
    v_reset: float | None,
    decay_input: bool,
    state: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All documents step together, without a graph of the steps: the backward pass is written out."""
    batch, length = x.shape[:2]
    layout = blocks(documents(batch, length, cu_seqlens, mask, x.device), 1)
    inputs = gather(x.flatten(0, 1).to(state.dtype), layout.tokens[:, 0])  # [N, C], step after step
    spikes, membrane = _LIF.apply(inputs, state, layout, tau, v_th, v_reset, decay_input)
    return scatter(spikes[:, None], layout.tokens, batch * length), membrane


class _LIF(torch.autograd.Function):
    """Leaky integrate-and-fire over blocks of one token; saves the charged membranes and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        state: Tensor,
        layout: Blocks,
        tau: float,
        v_th: float,
        v_reset: float | None,
        decay_input: bool,
    ) -> tuple[Tensor, Tensor]:
        rest = v_reset or 0.0
        charged = torch.zeros_like(x)

        def advance(here: slice, membrane: Tensor) -> Tensor:
            if decay_input:
                h = membrane + (x[here] - (membrane - rest)) / tau
            else:
                h = membrane - (membrane - rest) / tau + x[here]
            charged[here] = h
            return torch.where(h >= v_th, h - v_th if v_reset is None else torch.full_like(h, v_reset), h)

        _, membrane = _scan(layout, advance, state)
        ctx.save_for_backward(charged)
        ctx.layout, ctx.v_th, ctx.v_reset = layout, v_th, v_reset
        ctx.leak, ctx.gain = 1 - 1 / tau, 1 / tau if decay_input else 1.0
        return (charged >= v_th).to(x.dtype), membrane

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (charged,) = ctx.saved_tensors
        spikes, membrane = gradients
        surrogate = 1 / (1 + (torch.pi * (charged - ctx.v_th)).square())
        if ctx.v_reset is None:
            through = 1 - ctx.v_th * surrogate
        else:
            through = (charged < ctx.v_th).to(charged.dtype) + (ctx.v_reset - charged) * surrogate
        direct = spikes * surrogate
        out = torch.zeros_like(charged)
        current, end = membrane[ctx.layout.order], len(charged)
        for active in reversed(ctx.layout.active):
            here = slice(end - active, end)
            out[here] = current[:active] * through[here] + direct[here]
            current = torch.cat([out[here] * ctx.leak, current[active:]])
            end -= active
        return out * ctx.gain, current[ctx.layout.order.argsort()], None, None, None, None, None


def short_conv(
    x: Tensor, weight: Tensor, *, state: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One gather and one product a tap, over all tokens; tokens before a document's first new one are its state."""
    batch, length = x.shape[:2]
    docs = documents(batch, length, cu_seqlens, mask, x.device)
    reach, dtype = state.shape[1], state_dtype(x.dtype)
    stream = torch.cat([x.flatten(0, 1), state.flatten(0, 1)]).to(dtype)
    taps = weight.to(dtype)

    def take(document: Tensor, relative: Tensor) -> Tensor:
        """Inputs `relative` tokens after the documents' first new ones."""
        new = docs.at(docs.starts[document] + relative)
        return stream[torch.where(relative >= 0, new, batch * length + (document + 1) * reach + relative)]

    rows = torch.arange(len(docs.lengths), device=x.device)
    document = torch.repeat_interleave(rows, docs.lengths)
    relative = torch.arange(len(docs.tokens), device=x.device) - docs.starts[document]
    out = torch.zeros_like(x.flatten(0, 1)[docs.tokens], dtype=dtype)
    for lag in range(reach + 1):
        out = out + taps[:, reach - lag] * take(document, relative - lag)
    last = take(rows[:, None], docs.lengths[:, None] + torch.arange(-reach, 0, device=x.device))
    return scatter(out[:, None], docs.tokens[:, None], batch * length), last.to(state.dtype)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    positions: Tensor,
    scale: float,
    sinks: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Blocks of queries, each with the keys of its own band, in one masked attention call."""
    batch, length = q.shape[:2]
    docs = documents(batch, length, cu_seqlens, mask, q.device)
    first = docs.first(positions)
    longest = docs.longest if state is None else int((first + docs.lengths).max())
    reach = max(1, min(window, longest))
    layout = blocks(docs, max(1, min(max(reach, CHUNK), MAX_QUERY_BLOCK, docs.longest)))
    size = layout.tokens.shape[1]
    behind = torch.arange(1 - reach, size, device=q.device)
    place = _key_places(layout.offset[:, None] + behind, layout, docs, first, state, batch * length)
    distance = torch.arange(size, device=q.device)[:, None] - behind
    # A query past its document's end sees itself, so that no row is empty.
    visible = (distance >= 0) & (distance < window) & (place >= 0)[:, None] | (distance == 0)
    keys, values = (gather(_stream(x, state, i), place).transpose(1, 2) for i, x in enumerate((k, v)))
    if sinks is not None:
        keys, values = (_with_sinks(x, sinks[:, i]) for i, x in enumerate((keys, values)))
        visible = pad(visible, (len(sinks), 0), value=True)
    out = _attend(gather(q.flatten(0, 1), layout.tokens), keys, values, visible, scale)
    return scatter(out, layout.tokens, batch * length), _remember(k, v, docs, first, state)


def _stream(x: Tensor, state: Tensor | None, part: int) -> Tensor:
    """New keys (part 0) or values (part 1), then those of the rings: `[B*T + D*capacity, H_kv, V]`."""
    new = x.flatten(0, 1)
    return new if state is None else torch.cat([new, state[:, :, part].flatten(0, 1).to(new.dtype)])


def _key_places(
    relative: Tensor, layout: Blocks, docs: Documents, first: Tensor, state: Tensor | None, num_tokens: int
) -> Tensor:
    """Where in the stream the key lies that is `relative [M, N]` tokens from its document's first new one; -1: none."""
    document = layout.document[:, None]
    new = (relative >= 0) & (relative < docs.lengths[document])
    place = docs.at(docs.starts[document] + relative).masked_fill(~new, -1)
    if state is None:
        return place
    capacity = state.shape[1]
    position = first[document] + relative
    stored = (relative < 0) & (relative >= -capacity) & (position >= 0)
    return torch.where(stored, num_tokens + document * capacity + position % capacity, place)


def _with_sinks(x: Tensor, sinks: Tensor) -> Tensor:
    """`sinks [S, H_kv, D]` before the keys or values `[M, H_kv, N, D]` of every block."""
    return torch.cat([sinks.to(x.dtype).transpose(0, 1).expand(len(x), -1, -1, -1), x], dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`q [M, C, H, D]`, `k, v [M, H_kv, N, D]`, `visible [M, C, N]`; a group's heads share keys as further queries."""
    groups = q.shape[2] // k.shape[1]
    queries = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    allowed = visible[:, None, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    out = scaled_dot_product_attention(queries, k, v, attn_mask=allowed, scale=scale)
    return out.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _remember(k: Tensor, v: Tensor, docs: Documents, first: Tensor, state: Tensor | None) -> Tensor | None:
    """The rings after these tokens: each document's last `capacity` tokens, at their position modulo capacity."""
    if state is None:
        return None
    capacity = state.shape[1]
    document = torch.repeat_interleave(torch.arange(len(docs.lengths), device=k.device), docs.lengths)
    relative = torch.arange(len(docs.tokens), device=k.device) - docs.starts[document]
    kept = relative >= docs.lengths[document] - capacity
    document, relative, token = document[kept], relative[kept], docs.tokens[kept]
    entries = torch.stack([k.flatten(0, 1)[token], v.flatten(0, 1)[token]], dim=1).to(state.dtype)
    return state.index_put((document, (first[document] + relative) % capacity), entries)
