"""Window attention over rings: blocks of queries for prompts, blocks of the ring for one token a sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Documents, by_token, token_stride
from ..slots import Slots, to_update
from .rows import FUSED, Rows, blocks, empty_output, flat, on_its_device, rows, slot_of, span, within

# Queries or keys of a tile, and the bytes it may have: a program holds several tiles in shared memory.
LARGEST_TILE = 64
TILE_BYTES = 16384
# Places of the ring that one program reads in a decode step: fixed, so that a row's bits do not depend on the batch.
SPAN = 512
SMALLEST_TILE = 16


@on_its_device
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    positions: Tensor,
    scale: float,
    sinks: Tensor | None,
    state: Tensor | Slots | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots | None]:
    """Softmax in fp32, block by block; new keys and values go into the ring after the last query read it."""
    docs = rows(q, cu_seqlens, mask)
    q, k, v = (by_token(x) for x in (q, k, v))
    sinks = None if sinks is None else sinks.detach().to(k.dtype).contiguous()
    pool, slots = None, None
    if state is not None:
        state, pool, slots = to_update(state)
    if not q.numel():
        return q.new_empty(*q.shape[:3], v.shape[3]), state
    if docs.tokens is None:
        first = positions[:, 0].contiguous()
    else:
        first = Documents(docs.tokens, docs.starts.diff()).first(positions)
    # No position is farther away than this.
    window = min(window, torch.iinfo(torch.int32).max)
    run = _decode if pool is not None and docs.length == 1 and docs.tokens is None else _prefill
    return run(docs, q, k, v, sinks, pool, slots, first, window, scale), state


def _prefill(
    docs: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    pool: Tensor | None,
    slots: Tensor | None,
    first: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    heads, groups, width = q.shape[2], *k.shape[2:]
    out = empty_output(v, docs, heads, width)
    block, keys = _tile(q)
    size = max(SMALLEST_TILE, min(keys, triton.next_power_of_2(docs.length)))
    cut = blocks(docs, size, q.device)
    place = (docs.tokens, docs.starts, cut.document, cut.offset, first, docs.length, docs.num_documents)
    capacity = 0 if pool is None else pool.shape[1]
    shape = {"GROUPS": groups, "WIDTH": width, "WIDTH_BLOCK": block, **FUSED}
    _prefill_kernel[(len(cut.document), heads)](
        *(q, k, v, sinks, pool, slots, *place, out, capacity, 0 if sinks is None else len(sinks), window, scale),
        *(token_stride(x) for x in (q, k, v)),
        HEADS=heads,
        **shape,
        QUERIES=size,
        KEYS=keys,
    )
    if pool is not None:
        strides = (token_stride(k), token_stride(v))
        _remember_kernel[(len(cut.document), groups)](k, v, pool, slots, *place, capacity, *strides, **shape, SIZE=size)
    return out


def _tile(q: Tensor) -> tuple[int, int]:
    """Channels of a tile for the heads of q, and how many queries or keys it has."""
    block = max(SMALLEST_TILE, triton.next_power_of_2(q.shape[3]))
    return block, max(SMALLEST_TILE, min(LARGEST_TILE, TILE_BYTES // (block * q.element_size())))


def _decode(
    docs: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    pool: Tensor,
    slots: Tensor | None,
    position: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    heads, groups, width = q.shape[2], *k.shape[2:]
    batch, members, capacity = docs.num_documents, q.shape[2] // k.shape[2], pool.shape[1]
    splits = triton.cdiv(capacity, SPAN)
    out = v.new_empty(batch, 1, heads, width)
    sums = q.new_empty(batch, heads, splits, width, dtype=torch.float32)
    weights = q.new_empty(batch, heads, splits, 2, dtype=torch.float32)
    block, keys = _tile(q)
    _decode_kernel[(batch, groups, splits)](
        *(q, k, v, sinks, pool, slots, position, sums, weights),
        *(capacity, 0 if sinks is None else len(sinks), window, scale),
        *(token_stride(x) for x in (q, k, v)),
        HEADS=heads,
        GROUPS=groups,
        WIDTH=width,
        WIDTH_BLOCK=block,
        MEMBERS=max(SMALLEST_TILE, triton.next_power_of_2(members)),
        KEYS=keys,
        SPAN=SPAN,
        SPLITS=splits,
        **FUSED,
    )
    _combine_kernel[(batch, heads)](
        *(sums, weights, out),
        HEADS=heads,
        WIDTH=width,
        BLOCK=block,
        SPLITS=splits,
        ROWS=triton.next_power_of_2(splits),
        **FUSED,
    )
    return out


@triton.jit
def _attend(query, key, value, visible, scale, top, total, sums):
    """One block of keys more: the running maximum, sum of weights and weighted sum of values."""
    logits = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
    logits = tl.where(visible, logits, -float("inf"))
    largest = tl.maximum(top, tl.max(logits, 1))
    # Where nothing was visible so far, the maximum is -inf and no difference with it has a value.
    base = tl.where(largest == -float("inf"), 0.0, largest)
    weights = tl.exp(logits - base[:, None])
    keep = tl.exp(top - base)
    total = total * keep + tl.sum(weights, 1)
    sums = sums * keep[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="tf32x3")
    return largest, total, sums


@triton.jit
def _sink_block(sinks, index, num_sinks, group, channel, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    exists = (index < num_sinks)[:, None] & (channel < WIDTH)[None, :]
    place = sinks + (index[:, None] * 2 * GROUPS + group) * WIDTH + channel[None, :]
    return tl.load(place, mask=exists, other=0.0), tl.load(place + GROUPS * WIDTH, mask=exists, other=0.0)


@triton.jit
def _prefill_kernel(
    q,
    k,
    v,
    sinks,
    pool,
    slots,
    tokens,
    starts,
    block_document,
    block_offset,
    first,
    length,
    num_documents,
    out,
    capacity,
    num_sinks,
    window,
    scale,
    q_stride,
    k_stride,
    v_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    document = tl.load(block_document + tl.program_id(0))
    if document >= num_documents:
        return
    head = tl.program_id(1)
    group = head // (HEADS // GROUPS)
    start, count = span(document, starts, length)
    offset = tl.load(block_offset + tl.program_id(0))
    place = offset + tl.arange(0, QUERIES)
    exists = place < count
    token = flat(start + place, tokens, exists).to(tl.int64)
    channel = tl.arange(0, WIDTH_BLOCK)
    real = (channel < WIDTH)[None, :]
    query = tl.load(q + token[:, None] * q_stride + head * WIDTH + channel[None, :], mask=exists[:, None] & real)
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, WIDTH_BLOCK], tl.float32)
    query = tl.where(exists[:, None] & real, query, 0.0)
    if sinks is not None:
        for begin in range(0, num_sinks, KEYS):
            index = begin + tl.arange(0, KEYS)
            key, value = _sink_block(sinks, index, num_sinks, group, channel, GROUPS, WIDTH)
            top, total, sums = _attend(query, key, value, (index < num_sinks)[None, :], scale, top, total, sums)
    if pool is not None:
        slot = slot_of(document, slots)
        position = tl.load(first + document).to(tl.int64)
        oldest = tl.maximum(tl.maximum(-position, offset - window + 1), -capacity)
        for begin in range(oldest, 0, KEYS):
            relative = begin + tl.arange(0, KEYS)
            # Not below zero, where a remainder would be negative.
            entry = tl.maximum(position + relative, 0) % capacity
            row = pool + ((slot * capacity + entry[:, None]) * 2 * GROUPS + group) * WIDTH + channel[None, :]
            stored = (relative < 0)[:, None] & (channel < within(WIDTH, slot >= 0))[None, :]
            key = tl.load(row, mask=stored, other=0.0).to(query.dtype)
            value = tl.load(row + GROUPS * WIDTH, mask=stored, other=0.0).to(query.dtype)
            visible = (relative < 0)[None, :] & (place[:, None] - relative[None, :] < window)
            top, total, sums = _attend(query, key, value, visible, scale, top, total, sums)
    for begin in range(tl.maximum(offset - window + 1, 0), tl.minimum(offset + QUERIES, count), KEYS):
        relative = begin + tl.arange(0, KEYS)
        other = flat(start + relative, tokens, relative < count).to(tl.int64)
        known = (relative < count)[:, None] & real
        key = tl.load(k + other[:, None] * k_stride + group * WIDTH + channel[None, :], mask=known, other=0.0)
        value = tl.load(v + other[:, None] * v_stride + group * WIDTH + channel[None, :], mask=known, other=0.0)
        distance = place[:, None] - relative[None, :]
        visible = (distance >= 0) & (distance < window)
        top, total, sums = _attend(query, key, value, visible, scale, top, total, sums)
    target = out + (token[:, None] * HEADS + head) * WIDTH + channel[None, :]
    tl.store(target, sums / total[:, None], mask=exists[:, None] & real)


@triton.jit
def _remember_kernel(
    k,
    v,
    pool,
    slots,
    tokens,
    starts,
    block_document,
    block_offset,
    first,
    length,
    num_documents,
    capacity,
    k_stride,
    v_stride,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A document's last `capacity` tokens into its ring, each at its position modulo the capacity."""
    document = tl.load(block_document + tl.program_id(0))
    if document >= num_documents:
        return
    group, slot = tl.program_id(1), slot_of(document, slots)
    start, count = span(document, starts, length)
    place = tl.load(block_offset + tl.program_id(0)) + tl.arange(0, SIZE)
    kept = (place < count) & (place >= count - capacity)
    token = flat(start + place, tokens, kept).to(tl.int64)
    entry = (tl.load(first + document).to(tl.int64) + place) % capacity
    channel = tl.arange(0, WIDTH_BLOCK)
    held = kept[:, None] & (channel < within(WIDTH, slot >= 0))[None, :]
    key = tl.load(k + token[:, None] * k_stride + group * WIDTH + channel[None, :], mask=held, other=0.0)
    value = tl.load(v + token[:, None] * v_stride + group * WIDTH + channel[None, :], mask=held, other=0.0)
    row = pool + ((slot * capacity + entry[:, None]) * 2 * GROUPS + group) * WIDTH + channel[None, :]
    tl.store(row, key, mask=held)
    tl.store(row + GROUPS * WIDTH, value, mask=held)


@triton.jit
def _decode_kernel(
    q,
    k,
    v,
    sinks,
    pool,
    slots,
    first,
    part_sums,
    part_weights,
    capacity,
    num_sinks,
    window,
    scale,
    q_stride,
    k_stride,
    v_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """All heads of a group over one part of the ring; the first part has the sinks and the new token too.

    Nobody reads the place in the ring that the new token takes.
    """
    row, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = slot_of(row, slots)
    position = tl.load(first + row).to(tl.int64)
    newest = position % capacity
    member, channel = tl.arange(0, MEMBERS), tl.arange(0, WIDTH_BLOCK)
    head = group * (HEADS // GROUPS) + member
    real = (channel < WIDTH)[None, :]
    used = (member < HEADS // GROUPS)[:, None] & real
    query = tl.load(q + row * q_stride + head[:, None] * WIDTH + channel[None, :], mask=used, other=0.0)
    top = tl.full([MEMBERS], -float("inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    sums = tl.zeros([MEMBERS, WIDTH_BLOCK], tl.float32)
    for begin in range(split * SPAN, tl.minimum(split * SPAN + SPAN, capacity), KEYS):
        entry = begin + tl.arange(0, KEYS)
        age = (newest - entry + capacity) % capacity
        visible = (entry < capacity) & (entry < split * SPAN + SPAN) & (age > 0) & (age < window) & (age <= position)
        place = pool + ((slot * capacity + entry[:, None]) * 2 * GROUPS + group) * WIDTH + channel[None, :]
        held = visible[:, None] & (channel < within(WIDTH, slot >= 0))[None, :]
        key = tl.load(place, mask=held, other=0.0).to(query.dtype)
        value = tl.load(place + GROUPS * WIDTH, mask=held, other=0.0).to(query.dtype)
        top, total, sums = _attend(query, key, value, visible[None, :], scale, top, total, sums)
    if split == 0:
        if sinks is not None:
            for begin in range(0, num_sinks, KEYS):
                index = begin + tl.arange(0, KEYS)
                key, value = _sink_block(sinks, index, num_sinks, group, channel, GROUPS, WIDTH)
                top, total, sums = _attend(query, key, value, (index < num_sinks)[None, :], scale, top, total, sums)
        own = (tl.arange(0, KEYS) == 0)[:, None] & real
        key = tl.load(k + row * k_stride + group * WIDTH + channel[None, :], mask=own, other=0.0)
        value = tl.load(v + row * v_stride + group * WIDTH + channel[None, :], mask=own, other=0.0)
        visible = (tl.arange(0, KEYS) == 0)[None, :]
        top, total, sums = _attend(query, key, value, visible, scale, top, total, sums)
        place = pool + ((slot * capacity + newest) * 2 * GROUPS + group) * WIDTH + channel[None, :]
        place += tl.zeros([KEYS, 1], tl.int32)
        held = own & (channel < within(WIDTH, slot >= 0))[None, :]
        tl.store(place, key, mask=held)
        tl.store(place + GROUPS * WIDTH, value, mask=held)
    part = (row * HEADS + head) * SPLITS + split
    valid = member < HEADS // GROUPS
    tl.store(part_sums + part[:, None] * WIDTH + channel[None, :], sums, mask=used)
    tl.store(part_weights + part * 2, top, mask=valid)
    tl.store(part_weights + part * 2 + 1, total, mask=valid)


@triton.jit
def _combine_kernel(
    part_sums,
    part_weights,
    out,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = (tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)) * SPLITS
    split, channel = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    exists = split < SPLITS
    top = tl.load(part_weights + (first + split) * 2, mask=exists, other=-float("inf"))
    total = tl.load(part_weights + (first + split) * 2 + 1, mask=exists, other=0.0)
    share = tl.exp(top - tl.max(top, 0))
    place = part_sums + (first + split)[:, None] * WIDTH + channel[None, :]
    sums = tl.load(place, mask=exists[:, None] & (channel < WIDTH)[None, :], other=0.0)
    result = tl.sum(sums * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + (first // SPLITS) * WIDTH + channel, result, mask=channel < WIDTH)
