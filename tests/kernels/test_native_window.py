"""Native attention over a window at every level, in floats and in pairs of bf16: sizes, chunks, threads, bad inputs."""

import pytest
import torch
from conftest import relative_rms
from devices import assert_no_bit_depends_on

from spikingbrain_kernels import Slots, window_attention
from spikingbrain_kernels.library import missing

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"native {missing()}"),
    pytest.mark.usefixtures("level"),
]

WINDOW, CAPACITY, LENGTH = 151, 197, 330
# Of a decode step the blocks of 64 keys that lie whole in the ring are read there: of 192 places all but the newest.
RINGS = [(CAPACITY, WINDOW), (192, 150), (70, 67)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def inputs(dtype, heads=14, groups=2, width=64, length=LENGTH, capacity=CAPACITY):
    """q, k and v, and the ring of tokens before them."""
    qkv = [torch.randn(2, length, n, width).to(dtype) for n in (heads, groups, groups)]
    return qkv, torch.randn(2, capacity, 2, groups, width).to(dtype)


def attend(qkv, ring, first=0, backend="native", window=WINDOW, **options):
    positions = torch.arange(first, first + qkv[0].shape[1]).expand(2, -1)
    return window_attention(*qkv, window=window, positions=positions, state=ring, backend=backend, **options)


@pytest.mark.parametrize(("heads", "groups", "width"), [(14, 2, 64), (3, 3, 32), (13, 1, 96), (2, 1, 256), (4, 2, 40)])
@pytest.mark.parametrize("length", [1, 2, 150])
@DTYPES
def test_any_size_equals_the_reference(dtype, length, heads, groups, width):
    qkv, ring = inputs(dtype, heads, groups, width, length)
    out, after = attend(qkv, ring, first=300)
    expected, last = attend([x.double() for x in qkv], ring.double(), first=300, backend="reference")
    assert relative_rms(out.double(), expected) < TOLERANCE[dtype]
    assert torch.equal(after.double(), last)


@pytest.mark.parametrize("window", [1, 9, 70, 10**18])
@pytest.mark.parametrize("num_sinks", [0, 1, 70])
@pytest.mark.parametrize(("heads", "groups", "width"), [(14, 2, 64), (4, 2, 200), (3, 1, 5), (4, 2, 12)])
@DTYPES
def test_any_window_and_sinks_equal_the_reference(dtype, heads, groups, width, num_sinks, window):
    qkv, _ = inputs(dtype, heads, groups, width, 150)
    sinks = torch.randn(num_sinks, 2, groups, width) if num_sinks else None
    results = [attend(qkv, None, window=window, sinks=sinks, backend=name)[0] for name in ("native", "reference")]
    assert relative_rms(*results) < TOLERANCE[dtype]


def test_no_tokens_leave_the_ring_as_it_was():
    qkv, ring = inputs(torch.float32, length=0)
    out, after = attend(qkv, ring)
    assert out.shape == (2, 0, 14, 64)
    assert torch.equal(after, ring)


@pytest.mark.parametrize("first", [0, 1000])
@pytest.mark.parametrize(("capacity", "window"), RINGS)
@DTYPES
def test_chunks_and_threads_change_no_bit(dtype, capacity, window, first):
    qkv, before = inputs(dtype, capacity=capacity)
    cuts = [(1, [1] * LENGTH), (2, [3] * (LENGTH // 3)), (3, [129, 64, 137]), (5, [LENGTH - 1, 1])]
    assert_no_bit_depends_on(
        cuts, lambda part, start, ring: attend(part, ring, first + start, window=window), qkv, before
    )


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["native", "reference"])
@DTYPES
def test_a_bad_token_disturbs_no_earlier_token_and_no_other_row(dtype, backend, bad):
    qkv, _ = inputs(dtype, 4, 2, 8, 40)
    for x in qkv:
        x[0, 20] = bad
    out, _ = attend(qkv, None, window=9, backend=backend)
    assert bool(out[0, :20].isfinite().all())
    assert bool(out[1].isfinite().all())
    assert not bool(out[0, 20].isfinite().any())


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


@DTYPES
def test_torch_compile_takes_the_op_without_a_break(dtype):
    qkv, _ = inputs(dtype, 4, 2, 8, 3)
    pool, slots = torch.randn(5, 11, 2, 2, 8).to(dtype), torch.tensor([4, 1])
    positions = torch.tensor([[4, 5, 6], [0, 1, 2]])

    def step(q, k, v, pool):
        state = Slots(pool, slots)
        return window_attention(q, k, v, window=9, positions=positions, state=state, backend="native")[0] + 1

    pools = [pool.clone(), pool.clone()]
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*qkv, pools[0])
    assert torch.equal(out, step(*qkv, pools[1]))
    assert torch.equal(*pools)
