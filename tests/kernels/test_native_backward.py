"""Gradients of the native kernels against the reference in fp64."""

import pytest
import torch
from conftest import relative_rms
from devices import threads
from test_ops import inputs, state_of

from spikingbrain_kernels import Slots, gated_linear
from spikingbrain_kernels.library import missing
from spikingbrain_kernels.native.recurrent import CHUNK

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")

TOLERANCE = 1e-5
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 130]
EDGES = torch.tensor([0, 5, 5, 5 + CHUNK, 70])


def run(tensors, state, backend, **options):
    """Output, last states, and the gradients of a fixed random sum of both."""
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, state)]
    results = gated_linear(*leaves[:-1], scale=0.3, state=leaves[-1], backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in results]
    loss = sum((t * w).sum() for t, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def assert_equal_to_the_reference(tensors, state, tolerance=TOLERANCE, **options):
    exact = run([t.double() for t in tensors], state.double(), "reference", **options)
    for mine, reference in zip(run(tensors, state, "native", **options), exact, strict=True):
        assert relative_rms(mine.double(), reference) < tolerance


@pytest.mark.parametrize("scalar_decay", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_equal_the_reference(length, scalar_decay):
    assert_equal_to_the_reference(
        inputs("gated_linear", 2, length, scalar_decay=scalar_decay), state_of("gated_linear", 2)
    )


@pytest.mark.parametrize(("heads", "groups", "key", "value"), [(7, 1, 3, 5), (3, 3, 17, 40), (14, 2, 64, 64)])
def test_heads_of_any_size_and_number_are_served(heads, groups, key, value):
    sizes = {"groups": groups, "key": key, "value": value}
    assert_equal_to_the_reference(
        inputs("gated_linear", 1, 20, heads=heads, **sizes), state_of("gated_linear", 1, **sizes)
    )


def test_without_tokens_the_state_s_gradient_passes_through():
    tensors, state = inputs("gated_linear", 2, 0), state_of("gated_linear", 2)
    exact, mine = (run(tensors, state, backend) for backend in ("reference", "native"))
    assert torch.equal(mine[1], state)
    assert torch.equal(mine[-1], exact[-1])


def test_packed_documents_and_masked_tokens_have_the_reference_s_gradients():
    assert_equal_to_the_reference(inputs("gated_linear", 1, 70), state_of("gated_linear", 4), cu_seqlens=EDGES)
    mask = torch.rand(3, 40) > 0.4
    mask[2] = False
    assert_equal_to_the_reference(inputs("gated_linear", 3, 40), state_of("gated_linear", 3), mask=mask)


def test_threads_change_no_bit_of_gradients():
    tensors, state, runs = inputs("gated_linear", 3, 50), state_of("gated_linear", 3), []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(run(tensors, state, "native"))
    for other in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], other, strict=True))


def test_a_document_changes_no_bit_of_another_s_gradients():
    tensors, state = inputs("gated_linear", 1, 70), state_of("gated_linear", 4)
    changed = [torch.cat([t[:, :21] * 2, t[:, 21:]], dim=1) for t in tensors]
    runs = [run(these, state, "native", cu_seqlens=EDGES) for these in (tensors, changed)]
    for one, other in zip(runs[0][2:-1], runs[1][2:-1], strict=True):
        assert torch.equal(one[:, 21:], other[:, 21:])
        assert not torch.equal(one[:, :21], other[:, :21])


def test_half_precision_gradients_are_the_reference_s_rounded():
    tensors = [t.bfloat16() for t in inputs("gated_linear", 2, 40)]
    assert_equal_to_the_reference(tensors, state_of("gated_linear", 2), tolerance=1e-2)


def test_outputs_are_the_same_bits_with_and_without_gradients():
    tensors, state = inputs("gated_linear", 2, 50), state_of("gated_linear", 2)
    with torch.no_grad():
        plain = gated_linear(*tensors, scale=0.3, state=state, backend="native")
    assert all(torch.equal(*pair) for pair in zip(plain, run(tensors, state, "native")[:2], strict=True))


def test_states_in_a_pool_pass_gradients_to_what_is_read():
    tensors, pool = [t.requires_grad_() for t in inputs("gated_linear", 2, 9)], state_of("gated_linear", 3)
    grads = []
    for backend in ("native", "reference"):
        slots = Slots(pool.clone(), torch.tensor([2, 0]))
        out, _ = gated_linear(*tensors, scale=0.3, state=slots, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), tensors))
    for mine, reference in zip(*grads, strict=True):
        assert relative_rms(mine, reference) < TOLERANCE


def test_compiled_training_is_one_graph_with_the_same_gradients():
    tensors, state = inputs("gated_linear", 1, 20), state_of("gated_linear", 1)
    compiled = torch.compile(
        lambda *x: gated_linear(*x[:4], scale=0.3, state=x[4]), fullgraph=True, backend="aot_eager"
    )
    leaves = [t.clone().requires_grad_() for t in (*tensors, state)]
    eager = gated_linear(*leaves[:4], scale=0.3, state=leaves[4], backend="native")
    wanted = torch.autograd.grad(eager[0].sum() + eager[1].sum(), leaves)
    out, last = compiled(*leaves)
    for mine, reference in zip(torch.autograd.grad(out.sum() + last.sum(), leaves), wanted, strict=True):
        assert relative_rms(mine, reference) < TOLERANCE


def test_there_are_gradients_after_the_same_shape_was_served():
    tensors, state = inputs("gated_linear", 5, 11), state_of("gated_linear", 5)
    with torch.inference_mode():
        gated_linear(*tensors, scale=0.3, state=state.clone(), backend="native")
    assert_equal_to_the_reference(tensors, state)
