"""The same ops in parallel torch: for training and prefill on any device, differentiable, cost linear in T."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .layout import Blocks, Documents, blocks, documents, gather, scatter

CHUNK = 64
SUB_CHUNK = 16
MAX_QUERY_BLOCK = 512


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
    inputs, state = _scan(layout, k * (total[:, :, -1:] - total).exp(), v, total[:, :, -1], state)
    out = _within(q, k, v, total) + (q * total.exp()[:, :, None]) @ inputs[:, :, None]
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [M, C, H, V]
    return scatter(out, layout.tokens, batch * length), state


def _chunk_size(longest: int) -> int:
    """One token for decoding, else whole sub-chunks, as few as the longest document needs."""
    return max(1, longest) if longest < SUB_CHUNK else min(CHUNK, -(-longest // SUB_CHUNK) * SUB_CHUNK)


def _scan(layout: Blocks, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Pass the state from chunk to chunk; gives the state before each chunk `[M, H, K, V]` and after each document."""
    updates = k.transpose(-1, -2) @ v
    keep = decay.exp()[..., None]
    current = state[layout.order]
    before, start = [], 0
    for active in layout.active:
        here = slice(start, start + active)
        before.append(current[:active])
        current = torch.cat([keep[here] * current[:active] + updates[here], current[active:]])
        start += active
    inputs = torch.cat(before) if before else updates
    return inputs, current[layout.order.argsort()]


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
