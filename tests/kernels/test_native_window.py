"""Native attention over a window at every level, in floats and in pairs of bf16: sizes, chunks, threads, bad inputs."""

import pytest
import torch
from conftest import relative_rms
from devices import at_level

from spikingbrain_kernels import window_attention
from spikingbrain_kernels.library import levels, missing

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"native {missing()}"),
    pytest.mark.usefixtures("level"),
]

WINDOW, CAPACITY, LENGTH = 151, 197, 330
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(params=levels() if missing() is None else [])
def level(request):
    """Every level this processor has, in turn, as the best one."""
    with at_level(request.param):
        yield


def inputs(dtype, heads=14, groups=2, width=64, length=LENGTH):
    """q, k and v, and the ring of tokens before them."""
    qkv = [torch.randn(2, length, n, width).to(dtype) for n in (heads, groups, groups)]
    return qkv, torch.randn(2, CAPACITY, 2, groups, width).to(dtype)


def attend(qkv, ring, first=0, backend="native", **options):
    positions = torch.arange(first, first + qkv[0].shape[1]).expand(2, -1)
    return window_attention(*qkv, window=WINDOW, positions=positions, state=ring, backend=backend, **options)


@pytest.mark.parametrize(("heads", "groups", "width"), [(14, 2, 64), (3, 3, 32), (13, 1, 96), (2, 1, 256), (4, 2, 40)])
@pytest.mark.parametrize("length", [1, 2, 150])
@DTYPES
def test_any_size_equals_the_reference(dtype, length, heads, groups, width):
    qkv, ring = inputs(dtype, heads, groups, width, length)
    out, after = attend(qkv, ring, first=300)
    expected, last = attend([x.double() for x in qkv], ring.double(), first=300, backend="reference")
    assert relative_rms(out.double(), expected) < TOLERANCE[dtype]
    assert torch.equal(after.double(), last)


@pytest.mark.parametrize("first", [0, 1000])
@DTYPES
def test_chunks_and_threads_change_no_bit(dtype, first):
    qkv, before = inputs(dtype)
    whole, threads = attend(qkv, before, first), torch.get_num_threads()

    def run(sizes):
        ring, outs, start = before, [], 0
        for size in sizes:
            out, ring = attend([x[:, start : start + size] for x in qkv], ring, first + start)
            outs.append(out)
            start += size
        return torch.cat(outs, 1), ring

    try:
        for count, sizes in ((1, [1] * LENGTH), (2, [3] * (LENGTH // 3)), (3, [129, 64, 137]), (5, [LENGTH - 1, 1])):
            torch.set_num_threads(count)
            for part, expected in zip(run(sizes), whole, strict=True):
                assert torch.equal(part, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [128, 129, 191])
@DTYPES
def test_what_a_query_does_not_see_changes_no_bit(dtype, place, bad):
    qkv, ring = inputs(dtype)
    expected, _ = attend(qkv, ring)
    for x in qkv[1:]:
        x[0, place] = bad
    out, _ = attend(qkv, ring)
    sees = torch.zeros(2, LENGTH, dtype=torch.bool)
    sees[0, place : place + WINDOW] = True
    assert torch.equal(out[~sees], expected[~sees])
    assert bool(out[sees].isnan().all())


@DTYPES
def test_scores_of_any_size_are_softened(dtype):
    (q, k, v), ring = inputs(dtype)
    out, _ = attend([q * 100, k, v], ring)
    expected, _ = attend([(q * 100).double(), k.double(), v.double()], ring.double(), backend="reference")
    assert relative_rms(out.double(), expected) < TOLERANCE[dtype]


@DTYPES
def test_a_gradient_changes_what_is_computed_by_no_more_than_rounding(dtype):
    qkv, _ = inputs(dtype)
    positions = torch.arange(LENGTH).expand(2, -1)
    outs = [
        window_attention(*x, window=WINDOW, positions=positions, backend="native")[0].detach()
        for x in (qkv, [x.clone().requires_grad_() for x in qkv])
    ]
    assert relative_rms(*outs) < TOLERANCE[dtype]
