"""Gradients of the native window attention against the reference in fp64."""

import sys

import pytest
import torch
from conftest import relative_rms
from devices import threads

from spikingbrain_kernels import window_attention
from spikingbrain_kernels.library import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")

TOLERANCE = 1e-5
EDGES = torch.tensor([0, 5, 5, 82, 150])


def inputs(batch, length, *, heads=4, groups=2, width=8, sinks=0):
    shapes = [(batch, length, heads, width), *[(batch, length, groups, width)] * 2, (sinks, 2, groups, width)]
    return [torch.randn(*shape) for shape in shapes]


def run(tensors, backend, *, window, positions=None, state=None, **options):
    """Output, and the gradients of a fixed random sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    positions = torch.arange(tensors[0].shape[1])[None] if positions is None else positions
    options = {**options, "sinks": leaves[3] if len(leaves[3]) else None, "state": state, "backend": backend}
    out, _ = window_attention(*leaves[:3], window=window, positions=positions, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    used = leaves if len(leaves[3]) else leaves[:3]
    return [out, *torch.autograd.grad((out * weight).sum(), used)]


def assert_equal_to_the_reference(tensors, tolerance=TOLERANCE, **options):
    exact = run([t.double() for t in tensors], "reference", **options)
    for mine, reference in zip(run(tensors, "native", **options), exact, strict=True):
        assert relative_rms(mine.double(), reference) < tolerance


@pytest.mark.parametrize("window", [2, 7, 64, 100, sys.maxsize])
@pytest.mark.parametrize("length", [2, 63, 65, 150])
def test_gradients_equal_the_reference(length, window):
    assert_equal_to_the_reference(inputs(2, length), window=window)


@pytest.mark.parametrize(("length", "window"), [(1, 7), (90, 1)])
def test_a_token_that_sees_only_itself_takes_its_value_whatever_query_and_key_are(length, window):
    tensors = inputs(2, length, groups=4)
    out, query, key, value = run(tensors, "native", window=window)
    assert torch.allclose(out, tensors[2])
    assert max(float(query.abs().max()), float(key.abs().max())) < 1e-5
    assert relative_rms(value, run(tensors, "reference", window=window)[3]) < TOLERANCE


@pytest.mark.usefixtures("level")
def test_every_level_has_the_reference_s_gradients():
    assert_equal_to_the_reference(inputs(1, 130, sinks=3), window=40)


@pytest.mark.parametrize(("heads", "groups", "width"), [(7, 1, 5), (3, 3, 40), (14, 2, 64), (70, 1, 3)])
def test_heads_of_any_size_and_number_are_served(heads, groups, width):
    assert_equal_to_the_reference(inputs(1, 80, heads=heads, groups=groups, width=width), window=50)


@pytest.mark.parametrize("sinks", [1, 6, 70])
def test_sinks_learn_from_every_query_of_every_document(sinks):
    assert_equal_to_the_reference(inputs(2, 90, sinks=sinks), window=20)
    positions = torch.arange(150) - torch.repeat_interleave(EDGES[:-1], EDGES.diff())
    options = {"cu_seqlens": EDGES, "positions": positions[None]}
    assert_equal_to_the_reference(inputs(1, 150, sinks=sinks), window=20, **options)


def test_packed_documents_and_masked_tokens_have_the_reference_s_gradients():
    positions = torch.arange(150) - torch.repeat_interleave(EDGES[:-1], EDGES.diff())
    assert_equal_to_the_reference(inputs(1, 150), window=30, cu_seqlens=EDGES, positions=positions[None])
    mask = torch.rand(3, 90) > 0.4
    mask[2] = False
    assert_equal_to_the_reference(inputs(3, 90), window=30, mask=mask, positions=(mask.cumsum(1) - 1).clamp(min=0))


def test_positions_may_begin_anywhere():
    assert_equal_to_the_reference(inputs(2, 90), window=30, positions=torch.arange(90) + torch.tensor([[3], [1000]]))


def test_what_a_ring_remembers_passes_gradients_to_queries():
    state = torch.randn(2, 11, 2, 2, 8)
    options = {"window": 9, "positions": torch.arange(40)[None] + 20}
    exact = run([t.double() for t in inputs(2, 40)], "reference", state=state.double(), **options)
    torch.manual_seed(42)
    state = torch.randn(2, 11, 2, 2, 8)
    for mine, reference in zip(run(inputs(2, 40), "native", state=state, **options), exact, strict=True):
        assert relative_rms(mine.double(), reference) < TOLERANCE


def test_without_tokens_there_are_gradients_too():
    assert [t.numel() for t in run(inputs(2, 0), "native", window=3)] == [0, 0, 0, 0]


def test_threads_change_no_bit_of_gradients():
    tensors, runs = inputs(3, 150, sinks=4), []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(run(tensors, "native", window=70))
    for other in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], other, strict=True))


def test_a_document_changes_no_bit_of_another_s_gradients():
    positions = (torch.arange(150) - torch.repeat_interleave(EDGES[:-1], EDGES.diff()))[None]
    tensors = inputs(1, 150)
    changed = [torch.cat([t[:, :82] * 2, t[:, 82:]], dim=1) for t in tensors[:3]] + tensors[3:]
    options = {"window": 30, "positions": positions, "cu_seqlens": EDGES}
    for one, other in zip(*(run(these, "native", **options) for these in (tensors, changed)), strict=True):
        assert torch.equal(one[:, 82:], other[:, 82:])
        assert not torch.equal(one[:, :82], other[:, :82])


def test_half_precision_gradients_are_the_reference_s_rounded():
    assert_equal_to_the_reference([t.bfloat16() for t in inputs(2, 90)], tolerance=1e-2, window=30)


def test_outputs_are_the_same_bits_with_and_without_gradients():
    q, k, v, _ = tensors = inputs(2, 150)
    with torch.no_grad():
        plain, _ = window_attention(q, k, v, window=70, positions=torch.arange(150)[None], backend="native")
    assert torch.equal(plain, run(tensors, "native", window=70)[0])


def test_large_scores_neither_overflow_nor_give_nan():
    q, k, v, sinks = inputs(1, 90)
    assert_equal_to_the_reference([q * 40, k * 40, v, sinks], tolerance=1e-3, window=30)


def test_compiled_training_is_one_graph_with_the_same_gradients():
    tensors, positions = inputs(1, 90, sinks=2), torch.arange(90)[None]

    def attend(q, k, v, sinks):
        return window_attention(q, k, v, window=30, positions=positions, sinks=sinks)[0].square().sum()

    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    pair = [torch.autograd.grad(function(*leaves), leaves) for function in (attend, compiled)]
    for mine, reference in zip(*pair, strict=True):
        assert relative_rms(mine, reference) < TOLERANCE
