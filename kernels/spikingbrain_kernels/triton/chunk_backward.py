"""Gradients of gated linear attention in chunks, for groups of query heads that share keys, values, decay and state.

The forward pass's states and scores are computed once more (`chunk.chunks_of`); then what each chunk adds to the
gradient of the state, that gradient between chunks, and within each chunk the gradients of scores, queries, keys,
values and decays (GLA, arXiv 2312.06635, section 4 and appendix C; every exponent is <= 0). Gradients are in fp32 and
have one writer each, so that a second run gives the same bits. The decays' are differences of q dq and k dk: where a
token sees hardly more than itself, their error is that of the larger two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..slots import to_update
from .chunk import CHUNK, STATE_BLOCK, SUB_CHUNK, Chunks, chunks_of, gated_linear_chunks, members_of
from .rows import FUSED, Rows, block_span, flat, on_its_device, within

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class LearningChunks(torch.autograd.Function):
    """`gated_linear_chunks` from states that are not overwritten, with gradients."""

    @staticmethod
    def forward(
        ctx: Any, docs: Rows, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The outputs and the states after the tokens."""
        ctx.save_for_backward(q, k, v, log_decay, state)
        ctx.docs, ctx.scale = docs, scale
        _, after, slots = to_update(state)
        return gated_linear_chunks(docs, q, k, v, log_decay, pool=after, slots=slots, scale=scale), after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor, to_state: Tensor) -> tuple[Tensor | None, ...]:
        """Of q, k, v, the decay and the states before."""
        q, k, v, log_decay, state = inputs = ctx.saved_tensors
        results = to_out.contiguous(), to_state.contiguous()
        found = gated_linear_gradients(q, k, v, log_decay, state, *results, docs=ctx.docs, scale=ctx.scale)
        return None, *(x.to(like.dtype) for x, like in zip(found, inputs, strict=True)), None


@on_its_device
def gated_linear_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    to_out: Tensor,
    to_state: Tensor,
    *,
    docs: Rows,
    scale: float,
) -> Gradients:
    """Gradients of q, k, v, the decay and the first states `[D, H_kv, K, V]`, in fp32.

    `to_out [B, T, H, V]`, `to_state [D, H_kv, K, V]`: those of the outputs and of the states after the tokens, without
    gaps. The others are tensors by token, see `layout.by_token`.
    """
    # Masked tokens are written by nobody.
    found = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v, log_decay)]
    if not to_out.numel():
        return found[0], found[1], found[2], found[3], to_state.clone()
    _, pool, slots = to_update(state)
    c = chunks_of(docs, q, k, v, log_decay, pool=pool, slots=slots)
    changes, first = _changes(docs, c, q, to_out, to_state, scale)
    slopes = q.new_empty(c.scores.shape, dtype=torch.float32)
    ends = c.keep.new_empty(*c.keep.shape[:2], CHUNK // SUB_CHUNK, c.keep.shape[2])
    to_q, to_k, to_v, to_decay = found
    heads, groups = q.shape[2], k.shape[2]
    members = {"SUB": SUB_CHUNK, "MEMBERS": members_of(heads // groups)}
    cut, parts = len(c.cut.document), CHUNK // SUB_CHUNK
    _slopes_kernel[(cut, heads)](
        *(v, to_out, slopes, scale, *c.place),
        **c.given("v_stride", "HEADS", "GROUPS", "CHUNK", "VALUE", "VALUE_BLOCK"),
        **FUSED,
    )
    _to_values_kernel[(cut, groups, c.parts)](
        *(k, c.total, c.scores, changes, to_out, to_v, scale, *c.place), **c.given("k_stride"), **_shapes(c), **FUSED
    )
    _to_queries_kernel[(cut, heads, parts)](
        *(k, c.total, c.states, slopes, to_out, to_q, scale, *c.place),
        **c.given("k_stride"),
        **_shapes(c),
        SUB=SUB_CHUNK,
        **FUSED,
    )
    _to_keys_kernel[(cut, groups, parts)](
        *(q, k, v, c.total, changes, slopes, to_k, ends, *c.place),
        **c.given("q_stride", "k_stride", "v_stride"),
        **_shapes(c),
        **members,
        **FUSED,
    )
    _to_decays_kernel[(cut, groups)](
        *(q, k, c.states, c.keep, changes, to_q, to_k, ends, to_decay, *c.place),
        **c.given("q_stride", "k_stride"),
        **_shapes(c),
        DECAY=log_decay.shape[3],
        PARTS=parts,
        **FUSED,
    )
    return to_q, to_k, to_v, to_decay, first


def _shapes(c: Chunks) -> dict[str, int]:
    return {**c.shape, **c.wide}


def _changes(docs: Rows, c: Chunks, q: Tensor, to_out: Tensor, to_state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk, and of the first ones."""
    changes, first = torch.empty_like(c.states), torch.empty_like(to_state)
    groups, key, value = c.states.shape[1:]
    _changes_kernel[(len(c.cut.document), groups, c.parts)](
        *(q, c.total, to_out, changes, scale, *c.place), **c.given("q_stride"), **_shapes(c), **FUSED
    )
    block = min(STATE_BLOCK, triton.next_power_of_2(key * value))
    _changes_back_kernel[(docs.num_documents, groups, triton.cdiv(key * value, block))](
        *(changes, c.keep, to_state, first, c.cut.first),
        GROUPS=groups,
        SIZE=key * value,
        VALUE=value,
        KEY=key,
        BLOCK=block,
        **FUSED,
    )
    return changes, first


@triton.jit
def _changes_kernel(
    q,
    total,
    to_out,
    changes,
    scale,
    tokens,
    starts,
    block_document,
    block_offset,
    length,
    num_documents,
    q_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """What one chunk adds to the gradient of the state before it: scale * sum over heads of (q exp G)^T dout."""
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    index = tl.arange(0, CHUNK)
    exists = index < count
    token = flat(start + index, tokens, exists).to(tl.int64)
    keys = tl.arange(0, KEY_BLOCK)
    values = tl.program_id(2) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    has_key, has_value = exists[:, None] & (keys < KEY)[None, :], exists[:, None] & (values < VALUE)[None, :]
    sums = tl.load(total + (token[:, None] * GROUPS + group) * KEY + keys[None, :], mask=has_key, other=0.0)
    change = tl.zeros([KEY_BLOCK, VALUE_BLOCK], tl.float32)
    for member in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + member
        query = tl.load(q + token[:, None] * q_stride + head * KEY + keys[None, :], mask=has_key, other=0.0)
        place = (token[:, None] * HEADS + head) * VALUE + values[None, :]
        slope = tl.load(to_out + place, mask=has_value, other=0.0)
        decayed = (query.to(tl.float32) * tl.exp(sums)).to(slope.dtype)
        change += tl.dot(tl.trans(decayed), slope, input_precision="tf32x3")
    entry = changes + ((block * GROUPS + group) * KEY + keys[:, None]) * VALUE + values[None, :]
    tl.store(entry, scale * change, mask=(keys < KEY)[:, None] & (values < VALUE)[None, :])


@triton.jit
def _changes_back_kernel(
    changes,
    keep,
    last,
    first,
    first_block,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """D_c = keep_{c+1} D_{c+1} + change_{c+1}, from the last chunk on; the place of change_c gets D_c."""
    document, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entry = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < SIZE
    home = (document * GROUPS + group) * SIZE + entry
    memory = tl.load(last + home, mask=exists, other=0.0)
    begin, end = tl.load(first_block + document), tl.load(first_block + document + 1)
    for step in range(end - begin):
        row = (end - 1 - step) * GROUPS + group
        change = tl.load(changes + row * SIZE + entry, mask=exists, other=0.0)
        decay = tl.load(keep + row * KEY + entry // VALUE, mask=exists, other=0.0)
        tl.store(changes + row * SIZE + entry, memory, mask=exists)
        memory = decay * memory + change
    tl.store(first + home, memory, mask=exists)


@triton.jit
def _slopes_kernel(
    v,
    to_out,
    slopes,
    scale,
    tokens,
    starts,
    block_document,
    block_offset,
    length,
    num_documents,
    v_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """Gradients of one head's scores: scale * dout v^T; zero for tokens that come later."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // (HEADS // GROUPS)
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    index = tl.arange(0, CHUNK)
    exists = index < count
    token = flat(start + index, tokens, exists).to(tl.int64)
    found = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in range(0, VALUE, VALUE_BLOCK):
        values = part + tl.arange(0, VALUE_BLOCK)
        has_value = exists[:, None] & (values < VALUE)[None, :]
        value = tl.load(v + token[:, None] * v_stride + group * VALUE + values[None, :], mask=has_value, other=0.0)
        place = (token[:, None] * HEADS + head) * VALUE + values[None, :]
        slope = tl.load(to_out + place, mask=has_value, other=0.0)
        found += tl.dot(slope, tl.trans(value), input_precision="tf32x3")
    found = tl.where(index[:, None] >= index[None, :], scale * found, 0.0)
    tl.store(slopes + (token[:, None] * HEADS + head) * CHUNK + index[None, :], found, mask=exists[:, None])


@triton.jit
def _to_values_kernel(
    k,
    total,
    scores,
    changes,
    to_out,
    to_v,
    scale,
    tokens,
    starts,
    block_document,
    block_offset,
    length,
    num_documents,
    k_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """scale * sum over heads of scores^T dout, and (k exp(G_end - G)) D for the state after the chunk."""
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    index = tl.arange(0, CHUNK)
    exists = index < count
    token = flat(start + index, tokens, exists).to(tl.int64)
    keys = tl.arange(0, KEY_BLOCK)
    values = tl.program_id(2) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    has_key, has_value = exists[:, None] & (keys < KEY)[None, :], exists[:, None] & (values < VALUE)[None, :]
    sums = tl.load(total + (token[:, None] * GROUPS + group) * KEY + keys[None, :], mask=has_key, other=0.0)
    last = flat(start + tl.minimum(count, CHUNK) - 1, tokens, count > 0).to(tl.int64)
    end = tl.load(total + (last * GROUPS + group) * KEY + keys, mask=keys < within(KEY, count > 0), other=0.0)
    key = tl.load(k + token[:, None] * k_stride + group * KEY + keys[None, :], mask=has_key, other=0.0)
    entry = changes + ((block * GROUPS + group) * KEY + keys[:, None]) * VALUE + values[None, :]
    change = tl.load(entry, mask=(keys < KEY)[:, None] & (values < VALUE)[None, :], other=0.0)
    late = (key.to(tl.float32) * tl.exp(tl.minimum(end[None, :] - sums, 0.0))).to(key.dtype)
    result = tl.dot(late, change.to(key.dtype), input_precision="tf32x3")
    causal = exists[:, None] & (index[:, None] >= index[None, :])
    for member in range(HEADS // GROUPS):
        row = token[:, None] * HEADS + group * (HEADS // GROUPS) + member
        score = tl.load(scores + row * CHUNK + index[None, :], mask=causal, other=0.0)
        slope = tl.load(to_out + row * VALUE + values[None, :], mask=has_value, other=0.0)
        result += scale * tl.dot(tl.trans(score).to(slope.dtype), slope, input_precision="tf32x3")
    tl.store(to_v + (token[:, None] * GROUPS + group) * VALUE + values[None, :], result, mask=has_value)


@triton.jit
def _to_queries_kernel(
    k,
    total,
    states,
    slopes,
    to_out,
    to_q,
    scale,
    tokens,
    starts,
    block_document,
    block_offset,
    length,
    num_documents,
    k_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SUB: tl.constexpr,
):
    """exp G_i (scale * dout_i S^T) + sum over j <= i of dscore_ij exp(G_i - G_j) k_j, for the queries of a sub-chunk.

    As in the scores, earlier sub-chunks go through the last token before this one.
    """
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // (HEADS // GROUPS)
    part, near, keys = tl.program_id(2), tl.arange(0, SUB), tl.arange(0, KEY_BLOCK)
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    exists = part * SUB + near < count
    token = flat(start + part * SUB + near, tokens, exists).to(tl.int64)
    has_key = exists[:, None] & (keys < KEY)[None, :]
    decay = tl.load(total + (token[:, None] * GROUPS + group) * KEY + keys[None, :], mask=has_key, other=0.0)
    target = slopes + (token * HEADS + head) * CHUNK
    result = tl.zeros([SUB, KEY_BLOCK], tl.float32)
    for step in range(0, VALUE, VALUE_BLOCK):
        values = step + tl.arange(0, VALUE_BLOCK)
        place = (token[:, None] * HEADS + head) * VALUE + values[None, :]
        slope = tl.load(to_out + place, mask=exists[:, None] & (values < VALUE)[None, :], other=0.0)
        entry = states + ((block * GROUPS + group) * KEY + keys[:, None]) * VALUE + values[None, :]
        memory = tl.load(entry, mask=(keys < KEY)[:, None] & (values < VALUE)[None, :], other=0.0)
        result += tl.dot(slope, tl.trans(memory.to(slope.dtype)), input_precision="tf32x3")
    result *= scale * tl.exp(decay)
    if part * SUB < count:
        before = flat(start + part * SUB - 1, tokens, part > 0).to(tl.int64)
        middle = tl.load(total + (before * GROUPS + group) * KEY + keys, mask=keys < within(KEY, part > 0), other=0.0)
        far = tl.zeros([SUB, KEY_BLOCK], tl.float32)
        for earlier in range(part):
            other = flat(start + earlier * SUB + near, tokens, True).to(tl.int64)
            known = (keys < KEY)[None, :]
            sums = tl.load(total + (other[:, None] * GROUPS + group) * KEY + keys[None, :], mask=known, other=0.0)
            key = tl.load(k + other[:, None] * k_stride + group * KEY + keys[None, :], mask=known, other=0.0)
            late = key.to(tl.float32) * tl.exp(tl.minimum(middle[None, :] - sums, 0.0))
            slope = tl.load(target[:, None] + earlier * SUB + near[None, :], mask=exists[:, None], other=0.0)
            far += tl.dot(slope.to(key.dtype), late.to(key.dtype), input_precision="tf32x3")
        result += far * tl.exp(tl.minimum(decay - middle[None, :], 0.0))
        for step in range(SUB):
            valid = part * SUB + step < count
            other = flat(start + part * SUB + step, tokens, valid).to(tl.int64)
            known = keys < within(KEY, valid)
            sums = tl.load(total + (other * GROUPS + group) * KEY + keys, mask=known, other=0.0)
            key = tl.load(k + other * k_stride + group * KEY + keys, mask=known, other=0.0).to(tl.float32)
            slope = tl.load(target + part * SUB + step, mask=exists & (near >= step), other=0.0)
            result += slope[:, None] * tl.exp(tl.minimum(decay - sums[None, :], 0.0)) * key[None, :]
    tl.store(to_q + (token[:, None] * HEADS + head) * KEY + keys[None, :], result, mask=has_key)


@triton.jit
def _to_keys_kernel(
    q,
    k,
    v,
    total,
    changes,
    slopes,
    to_k,
    ends,
    tokens,
    starts,
    block_document,
    block_offset,
    length,
    num_documents,
    q_stride,
    k_stride,
    v_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SUB: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """exp(G_end - G_j) (v_j D^T) + sum over heads and i >= j of dscore_ij exp(G_i - G_j) q_i, for a sub-chunk's keys.

    Later sub-chunks go through this one's last token; `ends` gets the first part times k, added up over the tokens.
    """
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, near, keys = tl.program_id(2), tl.arange(0, SUB), tl.arange(0, KEY_BLOCK)
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    count = tl.minimum(count, CHUNK)
    exists = part * SUB + near < count
    token = flat(start + part * SUB + near, tokens, exists).to(tl.int64)
    has_key = exists[:, None] & (keys < KEY)[None, :]
    decay = tl.load(total + (token[:, None] * GROUPS + group) * KEY + keys[None, :], mask=has_key, other=0.0)
    last = flat(start + count - 1, tokens, count > 0).to(tl.int64)
    end = tl.load(total + (last * GROUPS + group) * KEY + keys, mask=keys < within(KEY, count > 0), other=0.0)
    result = tl.zeros([SUB, KEY_BLOCK], tl.float32)
    for step in range(0, VALUE, VALUE_BLOCK):
        values = step + tl.arange(0, VALUE_BLOCK)
        has_value = exists[:, None] & (values < VALUE)[None, :]
        value = tl.load(v + token[:, None] * v_stride + group * VALUE + values[None, :], mask=has_value, other=0.0)
        entry = changes + ((block * GROUPS + group) * KEY + keys[:, None]) * VALUE + values[None, :]
        change = tl.load(entry, mask=(keys < KEY)[:, None] & (values < VALUE)[None, :], other=0.0)
        result += tl.dot(value, tl.trans(change.to(value.dtype)), input_precision="tf32x3")
    result *= tl.exp(tl.minimum(end[None, :] - decay, 0.0))
    key = tl.load(k + token[:, None] * k_stride + group * KEY + keys[None, :], mask=has_key, other=0.0)
    row = (block * GROUPS + group) * (CHUNK // SUB) + part
    tl.store(ends + row * KEY + keys, tl.sum(tl.where(has_key, result * key.to(tl.float32), 0.0), 0), mask=keys < KEY)
    if part * SUB < count:
        after = tl.minimum(part * SUB + SUB, count)
        middle = flat(start + after - 1, tokens, True).to(tl.int64)
        middle = tl.load(total + (middle * GROUPS + group) * KEY + keys, mask=keys < KEY, other=0.0)
        far = tl.zeros([SUB, KEY_BLOCK], tl.float32)
        for first in range(0, HEADS // GROUPS, MEMBERS):
            members = first + tl.arange(0, MEMBERS)
            head = group * (HEADS // GROUPS) + members
            is_head = members < HEADS // GROUPS
            for later in range(part + 1, tl.cdiv(count, SUB)):
                valid = later * SUB + near < count
                other = flat(start + later * SUB + near, tokens, valid).to(tl.int64)
                known = valid[:, None] & (keys < KEY)[None, :]
                sums = tl.load(total + (other[:, None] * GROUPS + group) * KEY + keys[None, :], mask=known, other=0.0)
                weight = tl.exp(tl.minimum(sums - middle[None, :], 0.0))
                real = is_head[:, None, None] & valid[None, :, None]
                query = q + other[None, :, None] * q_stride + head[:, None, None] * KEY + keys[None, None, :]
                query = tl.load(query, mask=real & (keys < KEY)[None, None, :], other=0.0)
                decayed = tl.reshape(query.to(tl.float32) * weight[None, :, :], [MEMBERS * SUB, KEY_BLOCK])
                slope = slopes + (other[None, :, None] * HEADS + head[:, None, None]) * CHUNK
                slope = tl.load(slope + part * SUB + near[None, None, :], mask=real, other=0.0)
                slope = tl.reshape(slope, [MEMBERS * SUB, SUB]).to(key.dtype)
                far += tl.dot(tl.trans(slope), decayed.to(key.dtype), input_precision="tf32x3")
            for step in range(SUB):
                valid = part * SUB + step < count
                other = flat(start + part * SUB + step, tokens, valid).to(tl.int64)
                known = keys < within(KEY, valid)
                sums = tl.load(total + (other * GROUPS + group) * KEY + keys, mask=known, other=0.0)
                query = q + other * q_stride + head[:, None] * KEY + keys[None, :]
                query = tl.load(query, mask=is_head[:, None] & known[None, :], other=0.0).to(tl.float32)
                slope = slopes + (other * HEADS + head[:, None]) * CHUNK + part * SUB + near[None, :]
                slope = tl.load(
                    slope, mask=is_head[:, None] & (near <= within(step + 1, valid) - 1)[None, :], other=0.0
                )
                both = tl.sum(slope[:, :, None] * query[:, None, :], 0)
                result += both * tl.exp(tl.minimum(sums[None, :] - decay, 0.0))
        result += far * tl.exp(tl.minimum(middle[None, :] - decay, 0.0))
    tl.store(to_k + (token[:, None] * GROUPS + group) * KEY + keys[None, :], result, mask=has_key)


@triton.jit
def _to_decays_kernel(
    q,
    k,
    states,
    keep,
    changes,
    to_q,
    to_k,
    ends,
    to_decay,
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
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of the sums G of decays, q dq - k dk, added up from each token to the chunk's end, where D enters."""
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, count = block_span(block, starts, block_document, block_offset, length, num_documents)
    index, keys = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK)
    exists = index < count
    token = flat(start + index, tokens, exists).to(tl.int64)
    has_key = exists[:, None] & (keys < KEY)[None, :]
    shared = (token[:, None] * GROUPS + group) * KEY + keys[None, :]
    key = tl.load(k + token[:, None] * k_stride + group * KEY + keys[None, :], mask=has_key, other=0.0)
    change = -key.to(tl.float32) * tl.load(to_k + shared, mask=has_key, other=0.0)
    for member in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + member
        query = tl.load(q + token[:, None] * q_stride + head * KEY + keys[None, :], mask=has_key, other=0.0)
        own = tl.load(to_q + (token[:, None] * HEADS + head) * KEY + keys[None, :], mask=has_key, other=0.0)
        change += query.to(tl.float32) * own
    row = block * GROUPS + group
    end = tl.zeros([KEY_BLOCK], tl.float32)
    for part in range(0, VALUE, VALUE_BLOCK):
        values = part + tl.arange(0, VALUE_BLOCK)
        inside = (keys < KEY)[:, None] & (values < VALUE)[None, :]
        entry = (row * KEY + keys[:, None]) * VALUE + values[None, :]
        memory = tl.load(states + entry, mask=inside, other=0.0)
        end += tl.sum(memory * tl.load(changes + entry, mask=inside, other=0.0), 1)
    end *= tl.load(keep + row * KEY + keys, mask=keys < KEY, other=0.0)
    for part in range(PARTS):
        end += tl.load(ends + (row * PARTS + part) * KEY + keys, mask=keys < KEY, other=0.0)
    later = (index[:, None] <= index[None, :]).to(tl.float32)
    found = tl.dot(later, change, input_precision="tf32x3") + end[None, :]
    if DECAY > 1:
        tl.store(to_decay + shared, found, mask=has_key)
    else:
        found = tl.sum(tl.where(has_key, found, 0.0), 1)
        tl.store(to_decay + token * GROUPS + group, found, mask=exists)
