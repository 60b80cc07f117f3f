"""Chunks of gated linear attention for groups of query heads that share keys, values, decay and state.

Four kernels (GLA, arXiv 2312.06635, section 4; every exponent is <= 0): what each chunk adds to the state, the states
between chunks, the scores within a chunk, the outputs. The first two, and the exponentials of the third, are computed
once a group of heads instead of once a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import token_stride
from .rows import FUSED, Blocks, Rows, blocks, empty_output, flat, slot_of, span, within

CHUNK = 64
SUB_CHUNK = 16
VALUE_BLOCK = 64
STATE_BLOCK = 1024
# Heads that share a program where scores are computed.
MOST_MEMBERS = 8
# Tiles of wider keys do not fit into a GPU's shared memory.
LARGEST_KEY = 128


def gated_linear_chunks(
    docs: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    pool: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    """`gated_linear` on the states in `slots` of `pool`; tensors by token, see `layout.by_token`."""
    heads, (groups, key), value = q.shape[2], k.shape[2:], v.shape[3]
    out = empty_output(v, docs, heads, value)
    if not out.numel():
        return out
    cut = blocks(docs, CHUNK, q.device)
    place = (docs.tokens, docs.starts, cut.document, cut.offset, docs.length, docs.num_documents)
    strides = dict(zip(("q_stride", "k_stride", "v_stride"), map(token_stride, (q, k, v)), strict=True))
    key_block, width = (max(SUB_CHUNK, triton.next_power_of_2(n)) for n in (key, min(value, VALUE_BLOCK)))
    shape = {"HEADS": heads, "GROUPS": groups, "KEY": key, "KEY_BLOCK": key_block, "CHUNK": CHUNK}
    wide = {"VALUE": value, "VALUE_BLOCK": width}
    parts = triton.cdiv(value, width)

    total = q.new_empty(q.shape[0] * q.shape[1], groups, key, dtype=torch.float32)
    states = q.new_empty(len(cut.document), groups, key, value, dtype=torch.float32)
    keep = q.new_empty(len(cut.document), groups, key, dtype=torch.float32)
    scores = q.new_empty(q.shape[0] * q.shape[1], heads, CHUNK)
    _updates_kernel[(len(cut.document), groups, parts)](
        *(k, v, log_decay, total, states, keep, *place, token_stride(log_decay)),
        **_only(strides, "k_stride", "v_stride"),
        **_only(shape, "GROUPS", "KEY", "KEY_BLOCK", "CHUNK"),
        DECAY=log_decay.shape[3],
        **wide,
        **FUSED,
    )
    _pass_states(docs, cut, states, keep, pool, slots)
    members = min(MOST_MEMBERS, triton.next_power_of_2(heads // groups))
    member_parts = triton.cdiv(heads // groups, members)
    _scores_kernel[(len(cut.document), groups * member_parts, CHUNK // SUB_CHUNK)](
        *(q, k, total, scores, *place),
        **_only(strides, "q_stride", "k_stride"),
        **shape,
        SUB=SUB_CHUNK,
        MEMBERS=members,
        PARTS=member_parts,
        **FUSED,
    )
    _outputs_kernel[(len(cut.document), heads, parts)](
        *(q, v, total, states, scores, out, scale, *place),
        **_only(strides, "q_stride", "v_stride"),
        **shape,
        **wide,
        **FUSED,
    )
    return out


def _only(options: dict[str, int], *names: str) -> dict[str, int]:
    return {name: options[name] for name in names}


def _pass_states(docs: Rows, cut: Blocks, states: Tensor, keep: Tensor, pool: Tensor, slots: Tensor | None) -> None:
    """Turn what the chunks add into the states before them, and leave the last states in the pool."""
    groups, key, value = states.shape[1:]
    block = min(STATE_BLOCK, triton.next_power_of_2(key * value))
    grid = (docs.num_documents, groups, triton.cdiv(key * value, block))
    _states_kernel[grid](
        *(states, keep, pool, slots, cut.first),
        GROUPS=groups,
        SIZE=key * value,
        VALUE=value,
        KEY=key,
        BLOCK=block,
        **FUSED,
    )


@triton.jit
def _updates_kernel(
    k,
    v,
    log_decay,
    total,
    states,
    keep,
    tokens,
    starts,
    block_document,
    block_offset,
    length,
    num_documents,
    decay_stride,
    k_stride,
    v_stride,
    GROUPS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DECAY: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """(k exp(G_end - G))^T v of one chunk, G the decays summed from its start; exp G_end; and G for what follows."""
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    document = tl.load(block_document + block)
    if document >= num_documents:
        return
    start, count = span(document, starts, length)
    place = tl.load(block_offset + block) + tl.arange(0, CHUNK)
    exists = place < count
    token = flat(start + place, tokens, exists).to(tl.int64)
    keys = tl.arange(0, KEY_BLOCK)
    values = tl.program_id(2) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    has_key, has_value = exists[:, None] & (keys < KEY)[None, :], exists[:, None] & (values < VALUE)[None, :]
    shift = group * DECAY + (keys if DECAY > 1 else keys * 0)
    steps = tl.load(log_decay + token[:, None] * decay_stride + shift[None, :], mask=has_key, other=0.0)
    sums = tl.cumsum(steps.to(tl.float32), 0)
    end = tl.sum(steps.to(tl.float32), 0)
    key = tl.load(k + token[:, None] * k_stride + group * KEY + keys[None, :], mask=has_key, other=0.0)
    value = tl.load(v + token[:, None] * v_stride + group * VALUE + values[None, :], mask=has_value, other=0.0)
    late = (key.to(tl.float32) * tl.exp(tl.minimum(end[None, :] - sums, 0.0))).to(value.dtype)
    update = tl.dot(tl.trans(late), value, input_precision="tf32x3")
    first = (block * GROUPS + group) * KEY
    inside = (keys < KEY)[:, None] & (values < VALUE)[None, :]
    tl.store(states + (first + keys[:, None]) * VALUE + values[None, :], update, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(keep + first + keys, tl.exp(end), mask=keys < KEY)
        tl.store(total + (token[:, None] * GROUPS + group) * KEY + keys[None, :], sums, mask=has_key)


@triton.jit
def _states_kernel(
    states,
    keep,
    pool,
    slots,
    first_block,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S_c = keep_c S_{c-1} + update_c; the place of update_c gets S_{c-1}."""
    document, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = slot_of(document, slots)
    entry = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < SIZE
    held = entry < within(SIZE, slot >= 0)
    home = pool + (slot * GROUPS + group) * SIZE + entry
    memory = tl.load(home, mask=held, other=0.0)
    for block in range(tl.load(first_block + document), tl.load(first_block + document + 1)):
        row = block * GROUPS + group
        update = tl.load(states + row * SIZE + entry, mask=exists, other=0.0)
        decay = tl.load(keep + row * KEY + entry // VALUE, mask=exists, other=0.0)
        tl.store(states + row * SIZE + entry, memory, mask=exists)
        memory = decay * memory + update
    tl.store(home, memory, mask=held)


@triton.jit
def _scores_kernel(
    q,
    k,
    total,
    scores,
    tokens,
    starts,
    block_document,
    block_offset,
    length,
    num_documents,
    q_stride,
    k_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """sum_K q_i exp(G_i - G_j) k_j for the queries i of one sub-chunk, all heads of a group, and the tokens j <= i.

    Earlier sub-chunks go through the last token before this one, where both exponents are <= 0; within the sub-chunk
    every pair has its own exponential, shared by the heads.
    """
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1) // PARTS
    document = tl.load(block_document + block)
    if document >= num_documents:
        return
    start, count = span(document, starts, length)
    part = tl.program_id(2)
    start += tl.load(block_offset + block)
    count -= tl.load(block_offset + block)
    members = tl.program_id(1) % PARTS * MEMBERS + tl.arange(0, MEMBERS)
    keys, near = tl.arange(0, KEY_BLOCK), tl.arange(0, SUB)
    has_key = keys < KEY
    place = part * SUB + near
    exists = place < count
    token = flat(start + place, tokens, exists).to(tl.int64)
    rows = token[:, None] * GROUPS + group
    decay = tl.load(total + rows * KEY + keys[None, :], mask=exists[:, None] & has_key[None, :], other=0.0)
    head = group * (HEADS // GROUPS) + members
    real = (members < HEADS // GROUPS)[:, None] & exists[None, :]
    query = q + token[None, :, None] * q_stride + head[:, None, None] * KEY + keys[None, None, :]
    query = tl.load(query, mask=real[:, :, None] & has_key[None, None, :], other=0.0)
    target = scores + (token[None, :] * HEADS + head[:, None]) * CHUNK

    if part * SUB < count:
        before = flat(start + part * SUB - 1, tokens, part > 0)
        middle = tl.load(total + (before * GROUPS + group) * KEY + keys, mask=keys < within(KEY, part > 0), other=0.0)
        late = query.to(tl.float32) * tl.exp(tl.minimum(decay - middle[None, :], 0.0))[None, :, :]
        late = tl.reshape(late, [MEMBERS * SUB, KEY_BLOCK]).to(k.dtype.element_ty)
        for earlier in range(part):
            other = flat(start + earlier * SUB + near, tokens, True).to(tl.int64)
            sums = total + (other[:, None] * GROUPS + group) * KEY + keys[None, :]
            sums = tl.load(sums, mask=has_key[None, :], other=0.0)
            key = k + other[:, None] * k_stride + group * KEY + keys[None, :]
            key = tl.load(key, mask=has_key[None, :], other=0.0).to(tl.float32)
            key = (key * tl.exp(tl.minimum(middle[None, :] - sums, 0.0))).to(late.dtype)
            score = tl.reshape(tl.dot(late, tl.trans(key), input_precision="tf32x3"), [MEMBERS, SUB, SUB])
            columns = target[:, :, None] + earlier * SUB + near[None, None, :]
            tl.store(columns, score, mask=real[:, :, None])
        for step in range(SUB):
            valid = part * SUB + step < count
            other = flat(start + part * SUB + step, tokens, valid)
            known = keys < within(KEY, valid)
            sums = tl.load(total + (other * GROUPS + group) * KEY + keys, mask=known, other=0.0)
            key = tl.load(k + other * k_stride + group * KEY + keys, mask=known, other=0.0).to(tl.float32)
            weight = tl.exp(tl.minimum(decay - sums[None, :], 0.0)) * key[None, :]
            score = tl.sum(query.to(tl.float32) * weight[None, :, :], 2)
            tl.store(target + part * SUB + step, score, mask=real & (near >= step)[None, :])


@triton.jit
def _outputs_kernel(
    q,
    v,
    total,
    states,
    scores,
    out,
    scale,
    tokens,
    starts,
    block_document,
    block_offset,
    length,
    num_documents,
    q_stride,
    v_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """scale * ((q exp G) S + scores v) of one chunk and head."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    document = tl.load(block_document + block)
    if document >= num_documents:
        return
    group = head // (HEADS // GROUPS)
    start, count = span(document, starts, length)
    index = tl.arange(0, CHUNK)
    place = tl.load(block_offset + block) + index
    exists = place < count
    token = flat(start + place, tokens, exists).to(tl.int64)
    keys = tl.arange(0, KEY_BLOCK)
    values = tl.program_id(2) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    has_key, has_value = exists[:, None] & (keys < KEY)[None, :], exists[:, None] & (values < VALUE)[None, :]
    value = tl.load(v + token[:, None] * v_stride + group * VALUE + values[None, :], mask=has_value, other=0.0)
    query = tl.load(q + token[:, None] * q_stride + head * KEY + keys[None, :], mask=has_key, other=0.0)
    sums = tl.load(total + (token[:, None] * GROUPS + group) * KEY + keys[None, :], mask=has_key, other=0.0)
    decayed = (query.to(tl.float32) * tl.exp(sums)).to(value.dtype)
    entry = states + ((block * GROUPS + group) * KEY + keys[:, None]) * VALUE + values[None, :]
    memory = tl.load(entry, mask=(keys < KEY)[:, None] & (values < VALUE)[None, :], other=0.0)
    result = tl.dot(decayed, memory.to(value.dtype), input_precision="tf32x3")
    causal = exists[:, None] & (index[:, None] >= index[None, :])
    score = tl.load(scores + (token[:, None] * HEADS + head) * CHUNK + index[None, :], mask=causal, other=0.0)
    result += tl.dot(score.to(value.dtype), value, input_precision="tf32x3")
    tl.store(out + (token[:, None] * HEADS + head) * VALUE + values[None, :], scale * result, mask=has_value)
