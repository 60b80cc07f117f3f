"""Every backend of every op against the reference: outputs, final state, gradients, ragged batches, pools."""

import pytest
import torch
from conftest import relative_rms

from spikingbrain_kernels import (
    RECURRENT_OPS,
    BackendError,
    Slots,
    backends,
    gated_linear,
    gated_linear_step_,
    window_attention,
    window_attention_step_,
)

FP32 = 1e-5
WINDOW = 9
CAPACITY = 11


def inputs(batch, length, *, heads=4, groups=2, key=8, value=8, dtype=torch.float32, scalar_decay=False):
    q = torch.randn(batch, length, heads, key, dtype=dtype)
    k = torch.randn(batch, length, groups, key, dtype=dtype)
    v = torch.randn(batch, length, groups, value, dtype=dtype)
    decay = -torch.rand(batch, length, groups, 1 if scalar_decay else key, dtype=dtype) * 2
    return q, k, v, decay


def state_of(op, rows, *, groups=2, key=8, value=8, dtype=torch.float32):
    shape = (rows, groups, key, value) if op == "gated_linear" else (rows, CAPACITY, 2, groups, key)
    return torch.randn(*shape, dtype=dtype)


def call(op, tensors, backend, *, state=None, first=0, mask=None, cu_seqlens=None):
    q, k, v, decay = tensors
    if op == "gated_linear":
        return gated_linear(q, k, v, decay, scale=0.3, state=state, mask=mask, cu_seqlens=cu_seqlens, backend=backend)
    index = torch.arange(q.shape[1]).expand(q.shape[:2])
    if mask is not None:
        index = mask.long().cumsum(1) - 1
    if cu_seqlens is not None:
        index = index - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    options = {"window": WINDOW, "positions": index + first, "state": state, "mask": mask}
    return window_attention(q, k, v, **options, cu_seqlens=cu_seqlens, backend=backend)


def assert_same(results, references, tolerance):
    for result, reference in zip(results, references, strict=True):
        assert relative_rms(result, reference) < tolerance


def able(dtype, needs_gradients=False):
    return [(op, b.name) for op in RECURRENT_OPS for b in backends(op) if not b.missing("cpu", dtype, needs_gradients)]


BACKENDS = able(torch.float32)
OPTIMISED = [(op, name) for op, name in BACKENDS if name != "reference"]
DIFFERENTIABLE = [(op, name) for op, name in able(torch.float64, needs_gradients=True) if name != "reference"]
LENGTHS = [1, 3, 15, 16, 17, 63, 64, 65, 100, 130]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("op", "backend"), DIFFERENTIABLE)
def test_output_state_and_gradients_equal_the_reference(op, backend, length):
    tensors = [t.double().requires_grad_() for t in inputs(2, length)]
    state = state_of(op, 2, dtype=torch.float64).requires_grad_()
    runs = [call(op, tensors, name, state=state, first=CAPACITY + 2) for name in (backend, "reference")]
    assert_same(*runs, tolerance=1e-12)
    weights = [torch.randn_like(t) for t in runs[0]]
    used = [*tensors[: 4 if op == "gated_linear" else 3], state]
    losses = [sum((t * w).sum() for t, w in zip(run, weights, strict=True)) for run in runs]
    assert_same(*(torch.autograd.grad(loss, used) for loss in losses), tolerance=1e-11)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("op", "backend"), OPTIMISED)
def test_fp32_stays_within_its_tolerance(op, backend, length):
    tensors = inputs(2, length)
    state = state_of(op, 2)
    assert_same(*(call(op, tensors, name, state=state, first=CAPACITY + 2) for name in (backend, "reference")), FP32)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_half_precision_inputs_give_half_precision_outputs_and_a_wide_state(op, backend):
    tensors = [t.bfloat16() for t in inputs(1, 20)]
    out, state = call(op, tensors, backend, state=state_of(op, 1) * 0)
    exact, _ = call(op, [t.float() for t in tensors], backend, state=state_of(op, 1) * 0)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_rms(out, exact) < 1e-2


def test_one_decay_a_head_equals_the_same_decay_in_every_channel():
    q, k, v, decay = inputs(2, 70, scalar_decay=True)
    for backend in [name for op, name in BACKENDS if op == "gated_linear"]:
        one = gated_linear(q, k, v, decay, scale=1.0, backend=backend)
        assert_same(one, gated_linear(q, k, v, decay.expand(k.shape), scale=1.0, backend="reference"), FP32)


def test_strong_decay_neither_overflows_nor_gives_nan():
    q, k, v, decay = (t.requires_grad_() for t in inputs(1, 130))
    out, state = gated_linear(q, k, v, decay * 200, scale=1.0, backend="chunked")
    assert_same((out, state), gated_linear(q, k, v, decay * 200, scale=1.0, backend="reference"), FP32)
    gradients = torch.autograd.grad(out.sum() + state.sum(), (q, k, v, decay))
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_masked_tokens_do_not_exist(op, backend):
    tensors = inputs(3, 21)
    mask = torch.arange(21) >= torch.tensor([[0], [6], [20]])
    first = torch.tensor([[5], [0], [30]])
    state = state_of(op, 3)
    out, after = call(op, tensors, backend, state=state, first=first, mask=mask)
    for row, skipped in enumerate((0, 6, 20)):
        alone = [t[row : row + 1, skipped:] for t in tensors]
        expected = call(op, alone, backend, state=state[row : row + 1], first=int(first[row]))
        assert_same((out[row : row + 1, skipped:], after[row : row + 1]), expected, FP32)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_a_fully_masked_row_keeps_its_state(op, backend):
    tensors = inputs(2, 5)
    mask = torch.tensor([[True] * 5, [False] * 5])
    state = state_of(op, 2)
    assert torch.equal(call(op, tensors, backend, state=state, mask=mask)[1][1], state[1])


CU_SEQLENS = torch.tensor([0, 3, 40, 40, 105, 110])


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_packed_documents_equal_separate_ones(op, backend):
    tensors = inputs(1, 110)
    state = state_of(op, 5)
    out, after = call(op, tensors, backend, state=state, cu_seqlens=CU_SEQLENS)
    for number, (start, end) in enumerate(zip(CU_SEQLENS, CU_SEQLENS[1:], strict=False)):
        if start == end:
            assert torch.equal(after[number], state[number])
            continue
        alone = call(op, [t[:, start:end] for t in tensors], backend, state=state[number : number + 1])
        assert_same((out[:, start:end], after[number : number + 1]), alone, FP32)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_perturbing_one_document_changes_no_bit_of_another(op, backend):
    tensors = inputs(1, 110)
    other = [t.clone() for t in tensors]
    for t in other:
        t[:, 3:40] += 1 if t is not other[3] else -1
    outs = [call(op, x, backend, state=state_of(op, 5) * 0, cu_seqlens=CU_SEQLENS) for x in (tensors, other)]
    assert torch.equal(outs[0][0][:, 40:], outs[1][0][:, 40:])
    assert torch.equal(outs[0][0][:, :3], outs[1][0][:, :3])
    assert torch.equal(outs[0][1][[0, 2, 3, 4]], outs[1][1][[0, 2, 3, 4]])
    assert not torch.equal(outs[0][1][1], outs[1][1][1])


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_inputs_and_state_are_never_written_to(op, backend):
    tensors, state = inputs(2, 20), state_of(op, 2)
    before = [t.clone() for t in (*tensors, state)]
    call(op, tensors, backend, state=state)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, state), before, strict=True))


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_the_in_place_form_equals_the_plain_one_and_skips_padding_slots(op, backend, length):
    q, k, v, decay = inputs(3, length)
    pool = state_of(op, 5)
    before = pool.clone()
    slots = torch.tensor([4, -1, 2])
    if op == "gated_linear":
        out = gated_linear_step_(q, k, v, decay, pool=pool, slots=slots, scale=0.3, backend=backend)
    else:
        options = {"window": WINDOW, "positions": torch.arange(length).expand(3, -1) + 4, "backend": backend}
        out = window_attention_step_(q, k, v, pool=pool, slots=slots, **options)
    state = Slots(before, slots).read()
    expected, after = call(op, (q, k, v, decay), backend, state=state, first=4)
    assert torch.equal(out, expected)
    assert torch.equal(pool[[4, 2]], after[[0, 2]])
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


def test_unknown_names_and_wrong_shapes_are_errors_that_name_the_choices():
    q, k, v, decay = inputs(1, 4)
    with pytest.raises(BackendError, match="chunked, reference"):
        gated_linear(q, k, v, decay, scale=1.0, backend="cuda")
    with pytest.raises(BackendError, match="gated_linear, window_attention, linear"):
        backends("attention")
    with pytest.raises(ValueError, match="log_decay"):
        gated_linear(q, k, v, decay[:, :, :1], scale=1.0)
    with pytest.raises(ValueError, match="share"):
        gated_linear(q[:, :, :3], k, v, decay, scale=1.0)
    with pytest.raises(ValueError, match="rise from 0 to the 4 tokens"):
        gated_linear(q, k, v, decay, scale=1.0, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="window"):
        window_attention(q, k, v, window=0, positions=torch.arange(4)[None])
