"""Sinks of window attention: against the reference, and the reference against plain attention over a longer row."""

import pytest
import torch
from conftest import relative_rms
from torch.nn.functional import scaled_dot_product_attention

from spikingbrain_kernels import Slots, backends, window_attention, window_attention_step_

WINDOW, CAPACITY, SINKS, HEADS, GROUPS, WIDTH = 9, 11, 6, 4, 2, 8
OP = "window_attention"
BACKENDS = [backend.name for backend in backends(OP) if not backend.missing("cpu", torch.float64, gradients_of=OP)]
OPTIMISED = [name for name in BACKENDS if name != "reference"]


def inputs(rows, length, dtype=torch.float64):
    shapes = [(rows, length, HEADS, WIDTH), *[(rows, length, GROUPS, WIDTH)] * 2, (SINKS, 2, GROUPS, WIDTH)]
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


def call(tensors, backend, *, first=0, window=WINDOW, index=None, **options):
    q, k, v, sinks = tensors
    index = torch.arange(q.shape[1]).expand(q.shape[:2]) if index is None else index
    options = {"positions": index + first, "window": window, "backend": backend, **options}
    return window_attention(q, k, v, sinks=sinks, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_are_keys_that_every_query_sees_and_no_window_hides(backend):
    q, k, v, sinks = tensors = inputs(2, 21)
    keys, values = (torch.cat([sinks[:, i].expand(2, -1, -1, -1), x], 1) for i, x in enumerate((k, v)))
    distance = torch.arange(21)[:, None] - torch.arange(21)
    visible = torch.cat([torch.ones(21, SINKS, dtype=torch.bool), (distance >= 0) & (distance < WINDOW)], 1)
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    expected = scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True).transpose(1, 2)
    assert relative_rms(call(tensors, backend)[0], expected) < 1e-12


@pytest.mark.parametrize("length", [1, 3, 17, 100])
@pytest.mark.parametrize("backend", OPTIMISED)
def test_output_state_and_gradients_equal_the_reference(backend, length):
    tensors = [t.requires_grad_() for t in inputs(2, length)]
    state = torch.randn(2, CAPACITY, 2, GROUPS, WIDTH, dtype=torch.float64).requires_grad_()
    runs = [call(tensors, name, state=state, first=CAPACITY + 2) for name in (backend, "reference")]
    weights = [torch.randn_like(t) for t in runs[0]]
    losses = [sum((t * w).sum() for t, w in zip(run, weights, strict=True)) for run in runs]
    gradients = [torch.autograd.grad(loss, [*tensors, state]) for loss in losses]
    for pair in (*zip(*runs, strict=True), *zip(*gradients, strict=True)):
        assert relative_rms(*pair) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_and_padded_rows_equal_each_alone(backend):
    edges = torch.tensor([0, 3, 3, 30, 41])
    tensors = inputs(1, 41)
    index = torch.arange(41) - torch.repeat_interleave(edges[:-1], edges.diff())
    packed = call(tensors, backend, index=index[None], cu_seqlens=edges)[0]
    for start, end in ((0, 3), (3, 30), (30, 41)):
        document = [t[:, start:end] for t in tensors[:3]]
        assert relative_rms(packed[:, start:end], call([*document, tensors[3]], backend)[0]) < 1e-12
    mask = torch.arange(41)[None] >= 8
    padded = call(tensors, backend, index=(mask.long().cumsum(1) - 1).clamp(min=0), mask=mask)[0]
    alone = call([*(t[:, 8:] for t in tensors[:3]), tensors[3]], backend)[0]
    assert relative_rms(padded[:, 8:], alone) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_keeps_rings_only_and_a_sink_is_seen_from_every_slot(backend):
    q, k, v, sinks = tensors = inputs(3, 4)
    pool, slots = torch.randn(5, CAPACITY, 2, GROUPS, WIDTH, dtype=torch.float64), torch.tensor([4, -1, 2])
    before = pool.clone()
    options = {"window": WINDOW, "positions": torch.arange(4).expand(3, -1) + 7, "backend": backend}
    out = window_attention_step_(q, k, v, sinks=sinks, pool=pool, slots=slots, **options)
    expected, after = call(tensors, backend, first=7, state=Slots(before, slots).read())
    assert torch.equal(out, expected)
    assert torch.equal(pool[[4, 2]], after[[0, 2]])
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


def test_sinks_of_another_shape_are_refused():
    q, k, v, sinks = inputs(1, 4)
    with pytest.raises(ValueError, match=r"must be \[S, 2, 2, 8\]"):
        call([q, k, v, sinks[..., :4]], None)
