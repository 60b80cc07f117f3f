"""Chunks of gated linear attention for groups of query heads that share keys, values, decay and state.

Four kernels (GLA, arXiv 2312.06635, section 4; every exponent is <= 0): what each chunk adds to the state, the states
between chunks, the scores within a chunk, the outputs. The first two, and the exponentials of the third, are computed
once a group of heads instead of once a head.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import token_stride
from .rows import FUSED, Blocks, Rows, block_span, blocks, empty_output, flat, slot_of, within

CHUNK = 64
SUB_CHUNK = 16
VALUE_BLOCK = 64
STATE_BLOCK = 1024
# Heads that share a program where scores are computed.
MOST_MEMBERS = 8
# Tiles of wider keys do not fit into a GPU's shared memory.
LARGEST_KEY = 128


class Chunks(NamedTuple):
    """What the forward and the backward pass compute first.

    `total [B * T, H_kv, K]`: decays summed from a chunk's start. `states [M, H_kv, K, V]`: before each chunk. `keep
    [M, H_kv, K]`: what a chunk leaves of them. `scores [B * T, H, CHUNK]`: of a token's query with its chunk's keys.
    The rest are arguments of kernels: which tokens, distances from token to token, shapes, and those of values.
    """

    total: Tensor
    states: Tensor
    keep: Tensor
    scores: Tensor
    cut: Blocks
    place: tuple[Any, ...]
    strides: dict[str, int]
    shape: dict[str, int]
    wide: dict[str, int]

    @property
    def parts(self) -> int:
        """Programs for the values of a head."""
        return triton.cdiv(self.wide["VALUE"], self.wide["VALUE_BLOCK"])

    def given(self, *names: str) -> dict[str, int]:
        """The arguments of these names."""
        return {name: {**self.strides, **self.shape, **self.wide}[name] for name in names}


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
    heads, value = q.shape[2], v.shape[3]
    out = empty_output(v, docs, heads, value)
    if not out.numel():
        return out
    c = chunks_of(docs, q, k, v, log_decay, pool=pool, slots=slots)
    _outputs_kernel[(len(c.cut.document), heads, c.parts)](
        *(q, v, c.total, c.states, c.scores, out, scale, *c.place),
        **c.given("q_stride", "v_stride"),
        **c.shape,
        **c.wide,
        **FUSED,
    )
    return out


def chunks_of(
    docs: Rows, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, pool: Tensor, slots: Tensor | None
) -> Chunks:
    """What outputs and gradients are computed from; the states in `slots` of `pool` become those after the tokens."""
    heads, (groups, key), value = q.shape[2], k.shape[2:], v.shape[3]
    cut = blocks(docs, CHUNK, q.device)
    strides = {f"{name}_stride": token_stride(x) for name, x in zip("qkv", (q, k, v), strict=True)}
    key_block, width = (max(SUB_CHUNK, triton.next_power_of_2(n)) for n in (key, min(value, VALUE_BLOCK)))
    c = Chunks(
        total=q.new_empty(q.shape[0] * q.shape[1], groups, key, dtype=torch.float32),
        states=q.new_empty(len(cut.document), groups, key, value, dtype=torch.float32),
        keep=q.new_empty(len(cut.document), groups, key, dtype=torch.float32),
        scores=q.new_empty(q.shape[0] * q.shape[1], heads, CHUNK),
        cut=cut,
        place=(docs.tokens, docs.starts, cut.document, cut.offset, docs.length, docs.num_documents),
        strides=strides,
        shape={"HEADS": heads, "GROUPS": groups, "KEY": key, "KEY_BLOCK": key_block, "CHUNK": CHUNK},
        wide={"VALUE": value, "VALUE_BLOCK": width},
    )
    _updates_kernel[(len(cut.document), groups, c.parts)](
        *(k, v, log_decay, c.total, c.states, c.keep, *c.place, token_stride(log_decay)),
        **c.given("k_stride", "v_stride", "GROUPS", "KEY", "KEY_BLOCK", "CHUNK"),
        DECAY=log_decay.shape[3],
        **c.wide,
        **FUSED,
    )
    _pass_states(docs, cut, c.states, c.keep, pool, slots)
    members = members_of(heads // groups)
    member_parts = triton.cdiv(heads // groups, members)
    _scores_kernel[(len(cut.document), groups * member_parts, CHUNK // SUB_CHUNK)](
        *(q, k, c.total, c.scores, *c.place),
        **c.given("q_stride", "k_stride"),
        **c.shape,
        SUB=SUB_CHUNK,
        MEMBERS=members,
        PARTS=member_parts,
        **FUSED,
    )
    return c


def members_of(heads: int) -> int:
    """How many of a group's heads are computed at once."""
    return min(MOST_MEMBERS, triton.next_power_of_2(heads))


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
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    place = tl.arange(0, CHUNK)
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
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    part = tl.program_id(2)
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
    group = head // (HEADS // GROUPS)
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    index = tl.arange(0, CHUNK)
    exists = index < count
    token = flat(start + index, tokens, exists).to(tl.int64)
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
