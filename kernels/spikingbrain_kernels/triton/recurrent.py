"""Recurrences token by token: one program a document and a part of its state, which stays in registers meanwhile."""

import triton
import triton.language as tl
from torch import Tensor

from ..backends import after, needs_gradients
from ..layout import by_token, token_stride
from ..slots import Slots, to_update
from .chunk import CHUNK, LARGEST_KEY, gated_linear_chunks
from .chunk_backward import LearningChunks
from .rows import FUSED, UNFUSED, Rows, blocks, empty_output, flat, on_its_device, rows, slot_of, span, within

VALUE_BLOCK = 32
CHANNEL_BLOCK = 256
# Documents shorter than this on average are not worth cutting into chunks.
SHORT = 16


@on_its_device
def gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | Slots,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots]:
    """Chunks of tokens, or for short documents the recurrence itself; a group of heads has one state."""
    docs = rows(q, cu_seqlens, mask)
    if isinstance(state, Tensor) and needs_gradients(q, k, v, log_decay, state):
        if k.shape[3] > LARGEST_KEY:
            run = after("triton", "gated_linear", q, k, v, log_decay, state)
            return run(q, k, v, log_decay, scale=scale, state=state, cu_seqlens=cu_seqlens, mask=mask)
        return LearningChunks.apply(docs, *(by_token(x) for x in (q, k, v, log_decay)), state, scale)
    q, k, v, log_decay = (by_token(x) for x in (q, k, v, log_decay))
    state, pool, slots = to_update(state)
    run = _matrix_recurrence if _is_short(docs) or k.shape[3] > LARGEST_KEY else gated_linear_chunks
    return run(docs, q, k, v, log_decay, pool=pool, slots=slots, scale=scale), state


@on_its_device
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | Slots,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots]:
    """The recurrence itself for short documents; chunks are left to the next backend of the table."""
    docs = rows(q, cu_seqlens, mask)
    if not _is_short(docs):
        return _next_gated_delta(q, k, v, beta, log_decay, scale, state, {"cu_seqlens": cu_seqlens, "mask": mask})
    q, k, v, log_decay = (by_token(x) for x in (q, k, v, log_decay))
    state, pool, slots = to_update(state)
    return _matrix_recurrence(docs, q, k, v, log_decay, beta.contiguous(), pool=pool, slots=slots, scale=scale), state


def _next_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | Slots,
    ragged: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor | Slots]:
    run = after("triton", "gated_delta", q)
    held = state.read() if isinstance(state, Slots) else state
    out, memory = run(q, k, v, beta, log_decay, scale=scale, state=held, **ragged)
    out = out.view(*q.shape[:3], -1)
    if not isinstance(state, Slots):
        return out, memory
    state.write_(memory)
    return out, state


def _is_short(docs: Rows) -> bool:
    return docs.num_tokens < SHORT * docs.num_documents


def _matrix_recurrence(
    docs: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None = None,
    *,
    pool: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    """`gated_linear`, or with `beta` `gated_delta`, on the states in `slots` of `pool`."""
    heads, (groups, key), value = q.shape[2], k.shape[2:], v.shape[3]
    out = empty_output(v, docs, heads, value)
    if not out.numel():
        return out
    width = min(VALUE_BLOCK, triton.next_power_of_2(value))
    _matrix_recurrence_kernel[(docs.num_documents, groups, triton.cdiv(value, width))](
        *(q, k, v, log_decay, beta, pool, slots, docs.tokens, docs.starts, out, scale, docs.length),
        *(token_stride(x) for x in (q, k, v, log_decay)),
        HEADS=heads,
        GROUPS=groups,
        KEY=key,
        VALUE=value,
        DECAY=log_decay.shape[3],
        KEY_BLOCK=triton.next_power_of_2(key),
        VALUE_BLOCK=width,
        **FUSED,
    )
    return out


@triton.jit
def _matrix_recurrence_kernel(
    q,
    k,
    v,
    log_decay,
    beta,
    pool,
    slots,
    tokens,
    starts,
    out,
    scale,
    length,
    q_stride,
    k_stride,
    v_stride,
    decay_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    DECAY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    document, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = slot_of(document, slots)
    start, count = span(document, starts, length)
    keys = tl.arange(0, KEY_BLOCK)
    values = tl.program_id(2) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    has_key, has_value = keys < KEY, values < VALUE
    held = (keys < within(KEY, slot >= 0))[:, None] & has_value[None, :]
    place = pool + (slot * GROUPS + group) * KEY * VALUE + keys[:, None] * VALUE + values[None, :]
    memory = tl.load(place, mask=held, other=0.0)
    for step in range(count):
        token = flat(start + step, tokens, True)
        key = tl.load(k + token * k_stride + group * KEY + keys, mask=has_key, other=0.0).to(tl.float32)
        value = tl.load(v + token * v_stride + group * VALUE + values, mask=has_value, other=0.0).to(tl.float32)
        # One decay for all keys, or one each.
        shift = group * DECAY + (keys if DECAY > 1 else keys * 0)
        keep = tl.load(log_decay + token * decay_stride + shift, mask=has_key, other=0.0).to(tl.float32)
        memory = memory * tl.exp(keep)[:, None]
        if beta is not None:
            strength = tl.load(beta + token * GROUPS + group).to(tl.float32)
            value = strength * (value - tl.sum(key[:, None] * memory, 0))
        memory += key[:, None] * value[None, :]
        for member in tl.static_range(HEADS // GROUPS):
            head = group * (HEADS // GROUPS) + member
            query = tl.load(q + token * q_stride + head * KEY + keys, mask=has_key, other=0.0).to(tl.float32)
            result = scale * tl.sum(query[:, None] * memory, 0)
            tl.store(out + (token * HEADS + head) * VALUE + values, result, mask=has_value)
    tl.store(place, memory, mask=held)


@on_its_device
def wkv(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    *,
    state: Tensor | Slots,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots]:
    """RWKV-4's recurrence, channels side by side."""
    docs = rows(k, cu_seqlens, mask)
    state, pool, slots = to_update(state)
    out = empty_output(k, docs, k.shape[2])
    if out.numel():
        inputs = (k.contiguous(), v.contiguous(), time_decay.contiguous(), time_first.contiguous())
        tensors = (*inputs, pool, slots, docs.tokens, docs.starts, out)
        block = min(CHANNEL_BLOCK, triton.next_power_of_2(k.shape[2]))
        grid = (docs.num_documents, triton.cdiv(k.shape[2], block))
        _wkv_kernel[grid](*tensors, docs.length, CHANNELS=k.shape[2], BLOCK=block, **FUSED)
    return out, state


@triton.jit
def _wkv_kernel(
    k, v, time_decay, time_first, pool, slots, tokens, starts, out, length, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    document = tl.program_id(0).to(tl.int64)
    slot = slot_of(document, slots)
    start, count = span(document, starts, length)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channels < CHANNELS
    held = channels < within(CHANNELS, slot >= 0)
    place = pool + slot * 3 * CHANNELS + channels
    numerator = tl.load(place, mask=held, other=0.0)
    denominator = tl.load(place + CHANNELS, mask=held, other=0.0)
    top = tl.load(place + 2 * CHANNELS, mask=held, other=0.0)
    w = -tl.exp(tl.load(time_decay + channels, mask=exists, other=0.0).to(tl.float32))
    u = tl.load(time_first + channels, mask=exists, other=0.0).to(tl.float32)
    for step in range(count):
        token = flat(start + step, tokens, True)
        key = tl.load(k + token * CHANNELS + channels, mask=exists, other=0.0).to(tl.float32)
        value = tl.load(v + token * CHANNELS + channels, mask=exists, other=0.0).to(tl.float32)
        top = tl.where(denominator == 0, -float("inf"), top)
        largest = tl.maximum(top, u + key)
        old, new = tl.exp(top - largest), tl.exp(u + key - largest)
        result = (old * numerator + new * value) / (old * denominator + new)
        tl.store(out + token * CHANNELS + channels, result, mask=exists)
        largest = tl.maximum(top + w, key)
        old, new = tl.exp(top + w - largest), tl.exp(key - largest)
        numerator, denominator, top = old * numerator + new * value, old * denominator + new, largest
    tl.store(place, numerator, mask=held)
    tl.store(place + CHANNELS, denominator, mask=held)
    tl.store(place + 2 * CHANNELS, top, mask=held)


@on_its_device
def lif_scan(
    x: Tensor,
    *,
    tau: float,
    v_th: float,
    v_reset: float | None,
    decay_input: bool,
    state: Tensor | Slots,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | Slots]:
    """Leaky integrate-and-fire, neurons side by side; the same operations in the same order as the reference."""
    docs = rows(x, cu_seqlens, mask)
    state, pool, slots = to_update(state)
    out = empty_output(x, docs, x.shape[2])
    if out.numel():
        tensors = (x.contiguous(), pool, slots, docs.tokens, docs.starts, out)
        block = min(CHANNEL_BLOCK, triton.next_power_of_2(x.shape[2]))
        _lif_scan_kernel[(docs.num_documents, triton.cdiv(x.shape[2], block))](
            *(*tensors, docs.length, float(tau), float(v_th), float(v_reset or 0.0)),
            CHANNELS=x.shape[2],
            BLOCK=block,
            DECAY_INPUT=decay_input,
            SOFT_RESET=v_reset is None,
            # A rounding less and a spike may flip.
            **UNFUSED,
        )
    return out, state


@triton.jit
def _lif_scan_kernel(
    x,
    pool,
    slots,
    tokens,
    starts,
    out,
    length,
    tau,
    v_th,
    rest,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    SOFT_RESET: tl.constexpr,
):
    document = tl.program_id(0).to(tl.int64)
    slot = slot_of(document, slots)
    start, count = span(document, starts, length)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channels < CHANNELS
    held = channels < within(CHANNELS, slot >= 0)
    place = pool + slot * CHANNELS + channels
    membrane = tl.load(place, mask=held, other=0.0)
    leak = tl.full([BLOCK], 0.0, tl.float32) + tau
    for step in range(count):
        token = flat(start + step, tokens, True)
        current = tl.load(x + token * CHANNELS + channels, mask=exists, other=0.0).to(tl.float32)
        if DECAY_INPUT:
            charged = membrane + tl.div_rn(current - (membrane - rest), leak)
        else:
            charged = membrane - tl.div_rn(membrane - rest, leak) + current
        fires = charged >= v_th
        tl.store(out + token * CHANNELS + channels, fires.to(tl.float32), mask=exists)
        membrane = tl.where(fires, charged - v_th if SOFT_RESET else charged * 0 + rest, charged)
    tl.store(place, membrane, mask=held)


@on_its_device
def short_conv(
    x: Tensor, weight: Tensor, *, state: Tensor | Slots, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | Slots]:
    """All tokens at once, then the last inputs into the pool."""
    docs = rows(x, cu_seqlens, mask)
    state, pool, slots = to_update(state)
    channels, taps = weight.shape
    out = empty_output(x, docs, channels)
    if out.numel():
        x = x.contiguous()
        size = min(CHUNK, triton.next_power_of_2(docs.length))
        cut, block = blocks(docs, size, x.device), min(CHANNEL_BLOCK, triton.next_power_of_2(channels))
        tensors, parts = (pool, slots, docs.tokens, docs.starts), triton.cdiv(channels, block)
        shape = {"CHANNELS": channels, "TAPS": taps, "BLOCK": block, **FUSED}
        _short_conv_kernel[(len(cut.document), parts)](
            *(x, weight.contiguous(), *tensors, cut.document, cut.offset, out, docs.length, docs.num_documents),
            **shape,
            SIZE=size,
        )
        _last_inputs_kernel[(docs.num_documents, parts)](x, *tensors, docs.length, **shape)
    return out, state


@triton.jit
def _input(x, pool, slot, start, count, relative, channels, exists, tokens, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """The input `relative` tokens after a document's first new one; before it, what the state holds."""
    new = (relative >= 0) & (relative < count)
    place = flat(start + relative, tokens, new)
    fresh = tl.load(x + place * CHANNELS + channels, mask=exists & new, other=0.0).to(tl.float32)
    old = (channels < within(CHANNELS, slot >= 0)) & (relative < 0)
    held = tl.load(pool + (slot * (TAPS - 1) + TAPS - 1 + relative) * CHANNELS + channels, mask=old, other=0.0)
    return tl.where(new, fresh, held.to(tl.float32))


@triton.jit
def _short_conv_kernel(
    x,
    weight,
    pool,
    slots,
    tokens,
    starts,
    block_document,
    block_offset,
    out,
    length,
    num_documents,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    document = tl.load(block_document + tl.program_id(0))
    if document >= num_documents:
        return
    slot = slot_of(document, slots)
    start, count = span(document, starts, length)
    relative = tl.load(block_offset + tl.program_id(0)) + tl.arange(0, SIZE)[:, None]
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = channels < CHANNELS
    total = tl.zeros([SIZE, BLOCK], tl.float32)
    for lag in tl.static_range(TAPS):
        tap = tl.load(weight + channels * TAPS + TAPS - 1 - lag, mask=exists, other=0.0).to(tl.float32)
        total += tap * _input(x, pool, slot, start, count, relative - lag, channels, exists, tokens, CHANNELS, TAPS)
    place = flat(start + relative, tokens, relative < count)
    tl.store(out + place * CHANNELS + channels, total, mask=exists & (relative < count))


@triton.jit
def _last_inputs_kernel(
    x, pool, slots, tokens, starts, length, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    document = tl.program_id(0).to(tl.int64)
    slot = slot_of(document, slots)
    start, count = span(document, starts, length)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channels < within(CHANNELS, slot >= 0)
    # In this order an entry is read before it is overwritten, always by the thread of its channel.
    for place in tl.static_range(TAPS - 1):
        relative = count - (TAPS - 1) + place + channels * 0
        value = _input(x, pool, slot, start, count, relative, channels, exists, tokens, CHANNELS, TAPS)
        tl.store(pool + (slot * (TAPS - 1) + place) * CHANNELS + channels, value, mask=exists)
