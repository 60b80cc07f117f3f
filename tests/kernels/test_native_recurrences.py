"""Native recurrences at every level: any size, chunk and number of threads, bad and misaligned inputs, compiled."""

import pytest
import torch
from conftest import relative_rms
from devices import assert_no_bit_depends_on

from spikingbrain_kernels import Slots, gated_delta, gated_linear, lif_scan, short_conv, wkv
from spikingbrain_kernels.library import missing

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"native {missing()}"),
    pytest.mark.usefixtures("level"),
]

OPS = ("gated_linear", "gated_delta", "wkv", "lif_scan, soft", "lif_scan, hard", "short_conv", "short_conv of one tap")
SIZES = {
    "usual": (14, 2, 64, 64),
    "huge": (2, 1, 260, 300),
    "odd": (9, 3, 3, 5),
    "9 heads a state": (9, 1, 3, 5),
    "one": (1, 1, 1, 1),
}


def inputs(op, batch, length, size=(4, 2, 8, 8), dtype=torch.float32):
    """What `op` reads, its weights and a state; channels are as many as a value has elements."""
    heads, groups, key, value = size
    channels = groups * value
    if op in ("gated_linear", "gated_delta"):
        q, k = (torch.randn(batch, length, n, key).to(dtype) for n in (heads, groups))
        v = torch.randn(batch, length, groups, value).to(dtype)
        if op == "gated_linear":
            return [q, k, v, -torch.rand(batch, length, groups, key) * 2], [], torch.randn(batch, groups, key, value)
        k = torch.nn.functional.normalize(k, dim=-1)
        beta, decay = torch.rand(batch, length, groups, 1).to(dtype), -torch.rand(batch, length, groups, 1) * 2
        return [q, k, v, beta, decay], [], torch.randn(batch, groups, key, value)
    x = [torch.randn(batch, length, channels).to(dtype) * 2 for _ in range(2 if op == "wkv" else 1)]
    if op == "wkv":
        state = torch.randn(batch, 3, channels)
        state[:, 1] = 1 + state[:, 1].abs()
        return x, [torch.randn(channels), torch.randn(channels)], state
    if "short_conv" in op:
        taps = 1 if "one" in op else 4
        return x, [torch.randn(channels, taps)], torch.randn(batch, taps - 1, channels).to(dtype)
    return x, [], torch.randn(batch, channels)


def call(op, x, weights, state, backend="native"):
    if op == "gated_linear":
        return gated_linear(*x, scale=0.3, state=state, backend=backend)
    if op == "gated_delta":
        return gated_delta(*x, scale=0.3, state=state, backend=backend)
    if op == "wkv":
        return wkv(*x, *weights, state=state, backend=backend)
    if "short_conv" in op:
        return short_conv(*x, *weights, state=state, backend=backend)
    options = {"tau": 1.7, "v_th": 0.9, "v_reset": -0.2, "decay_input": True}
    options |= {"v_reset": None, "decay_input": False} if "soft" in op else {}
    return lif_scan(*x, **options, state=state, backend=backend)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("op", OPS)
def test_any_size_equals_the_reference(op, length, size):
    case = inputs(op, 2, length, size)
    (out, after), (expected, last) = call(op, *case), call(op, *case, backend="reference")
    assert relative_rms(out, expected) < 1e-5
    assert after.numel() == 0 or relative_rms(after, last) < 1e-5


@pytest.mark.parametrize("op", ["lif_scan, soft", "lif_scan, hard"])
def test_neurons_have_the_bits_of_the_reference(op):
    case = inputs(op, 3, 50)
    for result, expected in zip(call(op, *case), call(op, *case, backend="reference"), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_leave_the_states_as_they_were(op):
    x, weights, state = inputs(op, 2, 0)
    out, after = call(op, x, weights, state)
    assert out.shape[:2] == (2, 0)
    assert torch.equal(after, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_chunks_and_threads_change_no_bit(op, dtype):
    x, weights, first = inputs(op, 2, 150, SIZES["usual"], dtype)
    cuts = [(1, [1] * 150), (3, [64, 64, 22]), (5, [149, 1])]
    assert_no_bit_depends_on(cuts, lambda part, _, state: call(op, part, weights, state), x, first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf_do_what_they_do_in_the_reference(op, bad):
    x, weights, state = inputs(op, 2, 21)
    for t in x[:3]:
        t[0, 9].fill_(bad)
    (out, after), (expected, last) = (call(op, x, weights, state, name) for name in ("native", "reference"))
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.allclose(after, last, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert bool(out[0, :9].isfinite().all())
    assert bool(out[1].isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bad_token_of_gated_linear_is_bad_in_every_head(backend, bad):
    x, weights, state = inputs("gated_linear", 2, 40)
    for t in x[:3]:
        t[0, 20] = bad
    out, _ = call("gated_linear", x, weights, state, backend)
    assert bool(out[0, :20].isfinite().all())
    assert bool(out[1].isfinite().all())
    assert not bool(out[0, 20].isfinite().any())


@pytest.mark.parametrize("op", OPS)
def test_views_with_gaps_and_misaligned_memory_change_no_bit(op):
    x, weights, state = inputs(op, 3, 5)
    gaps = []
    for t in x:
        memory = torch.empty(*t.shape[:2], t[0, 0].numel() + 3)
        memory[..., 1:-2] = t.flatten(2)
        gaps.append(memory[..., 1:-2].unflatten(2, t.shape[2:]))
    assert all(t.data_ptr() % 64 == 4 for t in gaps)
    for result, expected in zip(call(op, gaps, weights, state), call(op, x, weights, state), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("op", OPS)
def test_torch_compile_takes_the_ops_without_a_break(op):
    x, weights, state = inputs(op, 2, 3)
    slots, pool = torch.tensor([4, 1]), torch.cat([state, state, state])

    def step(x, pool):
        return call(op, x, weights, Slots(pool, slots))[0] + 1

    pools = [pool.clone(), pool.clone()]
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(x, pools[0])
    assert torch.equal(out, step(x, pools[1]))
    assert torch.equal(*pools)
